"""The small guest image: the distribution's kernel, busybox and guest agent on one bootable disk.

Nothing is mounted and no loop device is used, so it is built the same way in a container and
without root: the boot partition is FAT, which mtools and syslinux write into a file, the data
partition is filled by `mkfs.ext4 -d`, and the disk is put together here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.packages import FAMILIES, Family, family_of_this_machine, fetch
from volery.setup.processes import exclusive

_BUILD_SECONDS = 300.0  # how long a second builder waits for the first
_RECIPE = 1  # raise it when the image is built differently from the same files
_SECTOR = 512
_MIB = 2**20
_BOOT_START = 1 * _MIB
_DATA_SIZE = 48 * _MIB
_FILES = Path(__file__).with_name("guest_files")

# Loaded in this order, each after what it depends on; what the kernel has built in or doesn't
# know is left out.
MODULES = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "ext4", "crc32c",
    "virtio_net", "af_packet", "e1000", "e1000e", "8139cp", "virtio_console", "virtio_balloon",
    "virtio_mem", "virtio-rng", "qemu_fw_cfg", "button", "evdev", "ahci", "ata_piix", "pvpanic-pci",
    "i6300esb",
)  # fmt: skip

_COMMAND_LINE = "console=tty0 console=ttyS0,115200 quiet panic=5 random.trust_cpu=on"
_SYSLINUX = f"""\
SERIAL 0 115200
PROMPT 0
TIMEOUT 1
DEFAULT volery
LABEL volery
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND {_COMMAND_LINE}
"""
_MBR_CODE = (
    "/usr/lib/syslinux/mbr/mbr.bin",  # Debian and its kin
    "/usr/share/syslinux/mbr.bin",  # Enterprise Linux
)


@dataclass(frozen=True)
class GuestImage:
    """What was built; kernel and initrd are there for booting without a disk."""

    disk: Path
    kernel: Path
    initrd: Path
    kernel_version: str
    sha256: str
    """Of the disk image."""
    built: bool
    """False: the one that was there is still right."""


@dataclass(frozen=True)
class _Parts:
    """Where the distribution's files were unpacked."""

    kernel: Path
    modules: Path
    """The directory that holds lib/modules."""
    version: str
    busybox: Path
    agent: Path


def build(home: Home, progress: Callable[[str], None] = lambda _: None) -> GuestImage:
    """Builds images/volery-guest.qcow2, or returns at once when its inputs are unchanged.

    `progress` is told, in a few words, what is done. Raises SetupError saying what is missing.
    """
    if platform.machine() != "x86_64":
        raise SetupError(
            f"The small guest image is made for x86_64 only, this machine is {platform.machine()}."
            " Upload an image of your own with `volery disk upload`."
        )
    family = FAMILIES[family_of_this_machine()]
    inputs = _inputs(family)
    with exclusive(home.images / ".lock", timeout_seconds=_BUILD_SECONDS):
        kept = _kept(home, inputs)
        return kept if kept is not None else _build(home, family, inputs, progress)


def _build(home: Home, family: Family, inputs: str, progress: Callable[[str], None]) -> GuestImage:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=home.images) as name:
        work = Path(name)
        parts = _unpack(family, work, progress)
        progress("packing the guest's first file system")
        kernel, initrd = work / "vmlinuz", work / "initrd"
        shutil.copyfile(parts.kernel, kernel)
        initrd.write_bytes(gzip.compress(cpio(_tree(parts, work)), compresslevel=9, mtime=0))
        progress("writing the guest's disk")
        disk = _disk(work, kernel, initrd)
        record = {
            "inputs": inputs,
            "kernel_version": parts.version,
            "sha256": _sha256(disk),
        }
        (work / "record").write_text(json.dumps(record))
        for source, target in zip((kernel, initrd, disk, work / "record"), _results(home), strict=True):
            source.chmod(0o644)
            source.replace(target)  # the record is the last: without it the image counts as absent
    built = _kept(home, inputs)
    assert built is not None
    return replace(built, built=True)


def _results(home: Home) -> tuple[Path, Path, Path, Path]:
    base = home.images / "volery-guest"
    return (
        base.with_suffix(".vmlinuz"),
        base.with_suffix(".initrd"),
        base.with_suffix(".qcow2"),
        base.with_suffix(".json"),
    )


def _kept(home: Home, inputs: str) -> GuestImage | None:
    kernel, initrd, disk, record = _results(home)
    try:
        known = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if known.get("inputs") != inputs or not (kernel.exists() and initrd.exists() and disk.exists()):
        return None
    return GuestImage(disk, kernel, initrd, known["kernel_version"], known["sha256"], built=False)


def _inputs(family: Family) -> str:
    """Names everything of ours that the image is made of. A newer kernel alone is no reason."""
    digest = hashlib.sha256(repr((_RECIPE, MODULES, _SYSLINUX, _DATA_SIZE, family)).encode())
    for path in sorted(_FILES.glob("*.sh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _unpack(family: Family, work: Path, progress: Callable[[str], None]) -> _Parts:
    progress("fetching the distribution's kernel, busybox and guest agent")
    root = work / "packages"
    fetch(family, root)
    kernels = sorted([*root.glob("boot/vmlinuz-*"), *root.glob("lib/modules/*/vmlinuz")])
    places = sorted([*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")])
    busybox = _first(root, "busybox", ("bin/busybox", "usr/bin/busybox", "sbin/busybox", "usr/sbin/busybox"))
    agent = _first(root, "the guest agent", ("usr/sbin/qemu-ga", "usr/bin/qemu-ga", "sbin/qemu-ga"))
    kernels += sorted(root.glob("usr/lib/modules/*/vmlinuz"))
    if not kernels or not places:
        raise SetupError(f"The kernel's package of {family.name} has no kernel where it is expected.")
    version = places[-1].name
    return _Parts(kernels[-1], places[-1].parents[2], version, busybox, agent)


def _first(root: Path, what: str, places: Sequence[str]) -> Path:
    for place in places:
        if (root / place).is_file():
            return root / place
    raise SetupError(f"The package with {what} has none of {', '.join(places)}.")


# --- the first file system ------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One file of a cpio archive, owned by root."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


_DIRECTORIES = (
    "bin", "sbin", "usr", "usr/bin", "usr/sbin", "etc", "etc/acpi", "etc/acpi/PWRF", "dev", "proc",
    "sys", "run", "tmp", "mnt", "data", "root", "lib", "lib/modules",
)  # fmt: skip
_OS_RELEASE = 'ID=volery-guest\nNAME="Volery guest"\nPRETTY_NAME="Volery guest"\nVERSION_ID=1\n'


def _tree(parts: _Parts, work: Path) -> list[Entry]:
    files: dict[str, Entry] = {}

    def add(name: str, data: bytes, mode: int = 0o755) -> None:
        for parent in [*Path(name).parents][-2::-1]:
            files.setdefault(str(parent), Entry(str(parent), 0o040755))
        files[name] = Entry(name, 0o100000 | mode, data)

    for directory in _DIRECTORIES:
        files[directory] = Entry(directory, 0o040755)
    files["dev/console"] = Entry("dev/console", 0o020600, device=(5, 1))
    add("init", (_FILES / "init.sh").read_bytes())
    add("lib/dhcp.sh", (_FILES / "dhcp.sh").read_bytes())
    add("sbin/shutdown", (_FILES / "shutdown.sh").read_bytes())
    add("etc/acpi/PWRF/00000080", b"#!/bin/busybox sh\nexec /sbin/shutdown -P\n")
    add("etc/os-release", _OS_RELEASE.encode(), 0o644)
    add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
    add("etc/group", b"root:x:0:\n", 0o644)
    add("bin/busybox", parts.busybox.read_bytes())
    for program in (parts.agent, parts.busybox):
        for library in _libraries(program):
            add(str(library).lstrip("/"), library.read_bytes())
    add("usr/sbin/qemu-ga", parts.agent.read_bytes())
    order = []
    for module, data in _modules(parts, work):
        order.append(module)
        add(f"lib/modules/{module}", data, 0o644)
    add("lib/modules/order", "".join(f"{name}\n" for name in order).encode(), 0o644)
    return list(files.values())


def _libraries(program: Path) -> list[Path]:
    """Every shared library the program needs, at the place where its loader looks for it."""
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    missing = re.findall(r"^\s*(\S+) => not found", listing.stdout, re.MULTILINE)
    if missing:
        raise SetupError(
            f"{program.name} needs {', '.join(missing)}, which this machine lacks. Install the package"
            " qemu-guest-agent's dependencies and run `make up` again."
        )
    found = re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listing.stdout, re.MULTILINE)
    return [Path(path) for path in found]


def _modules(parts: _Parts, work: Path) -> Iterator[tuple[str, bytes]]:
    """(file name, uncompressed module) in loading order."""
    # depmod writes beside the modules; a package's own list may be for another kernel's tools.
    _run(["depmod", "-b", str(parts.modules), parts.version])
    seen: set[str] = set()
    for name in MODULES:
        listing = subprocess.run(
            ["modprobe", "-d", str(parts.modules), "-S", parts.version, "--show-depends", name],
            capture_output=True,
            text=True,
            check=False,
        )
        for path in re.findall(r"^insmod (\S+)", listing.stdout, re.MULTILINE):
            module = re.sub(r"\.(xz|zst|gz)$", "", Path(path).name)
            if module not in seen:
                seen.add(module)
                yield module, _expanded(Path(path))


_EXPAND: dict[str, Callable[[Path], bytes]] = {
    ".ko": Path.read_bytes,
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".zst": lambda path: _run(["zstd", "-dcq", str(path)]),
}


def _expanded(path: Path) -> bytes:
    return _EXPAND[path.suffix](path)


def cpio(entries: Sequence[Entry]) -> bytes:
    """A "newc" archive, as the kernel unpacks it; the same entries give the same bytes."""
    archive = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        links = 2 if entry.mode & 0o170000 == 0o040000 else 1
        fields = (
            number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0
        )  # fmt: skip
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += b"\0" * (-len(archive) % 4) + entry.data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


# --- the disk -------------------------------------------------------------------------------


def _disk(work: Path, kernel: Path, initrd: Path) -> Path:
    boot, boot_size = _boot_partition(work, kernel, initrd)
    data = work / "data.img"
    content = work / "data"
    content.mkdir()
    (content / "README").write_text("Kept over reboots. A file `tick` here grows once a second.\n")
    with data.open("wb") as file:
        file.truncate(_DATA_SIZE)
    _run(
        [
            "mkfs.ext4",
            "-q",
            "-F",
            "-L",
            "volery-data",
            "-E",
            "root_owner=0:0,lazy_itable_init=0",
            "-d",
            str(content),
            str(data),
        ]
    )
    raw = work / "disk.raw"
    data_start = _BOOT_START + boot_size
    with raw.open("wb") as file:
        file.truncate(data_start + _DATA_SIZE)
        file.write(
            _boot_record(((_BOOT_START, boot_size, 0x0E, True), (data_start, _DATA_SIZE, 0x83, False)))
        )
        _copy_into(file.fileno(), boot, _BOOT_START)
        _copy_into(file.fileno(), data, data_start)
    disk = work / "disk.qcow2"
    _run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)])
    return disk


def _boot_partition(work: Path, kernel: Path, initrd: Path) -> tuple[Path, int]:
    used = kernel.stat().st_size + initrd.stat().st_size
    size = -(-(used + 4 * _MIB) // _MIB) * _MIB
    image = work / "boot.img"
    with image.open("wb") as file:
        file.truncate(size)
    config = work / "syslinux.cfg"
    config.write_text(_SYSLINUX)
    hidden = str(_BOOT_START // _SECTOR)
    # The geometry is what a BIOS reports for a disk of this kind; the boot sector may need it.
    _run(["mkfs.vfat", "-F", "16", "-n", "VOLERY-BOOT", "-h", hidden, "-g", "255/63", str(image)])
    # mtools would otherwise compare the size with a floppy's.
    _run(["mcopy", "-i", str(image), str(kernel), str(initrd), str(config), "::/"], MTOOLS_SKIP_CHECK="1")
    _run(["syslinux", "--install", str(image)], MTOOLS_SKIP_CHECK="1")
    return image, size


def _boot_record(partitions: Sequence[tuple[int, int, int, bool]]) -> bytes:
    """The first sector: boot code, then (start, size, type, bootable) of each partition."""
    code = next((Path(p) for p in _MBR_CODE if Path(p).is_file()), None)
    if code is None:
        raise SetupError(
            "syslinux's mbr.bin was not found. Install it: `apt-get install syslinux-common`, or"
            " `dnf install syslinux`."
        )
    table = b""
    for start, size, kind, bootable in partitions:
        # 0xfe 0xff 0xff: "beyond what cylinders can say"; only the sector numbers count.
        table += struct.pack(
            "<B3sB3sII",
            0x80 if bootable else 0,
            b"\xfe\xff\xff",
            kind,
            b"\xfe\xff\xff",
            start // _SECTOR,
            size // _SECTOR,
        )
    return code.read_bytes()[:440].ljust(440, b"\0") + b"VLRY\0\0" + table.ljust(64, b"\0") + b"\x55\xaa"


def _copy_into(descriptor: int, source: Path, offset: int) -> None:
    with source.open("rb") as file:
        while block := file.read(_MIB):
            if any(block):  # zeros stay a hole
                os.pwrite(descriptor, block, offset)
            offset += len(block)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(arguments: Sequence[str], **environment: str) -> bytes:
    try:
        done = subprocess.run(
            list(arguments), capture_output=True, check=True, env={**os.environ, **environment}
        )
    except FileNotFoundError as error:
        raise SetupError(
            f"{arguments[0]} is missing, and the guest image can't be built without it. `make up` installs it."
        ) from error
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{' '.join(arguments)} failed: {error.stderr.decode().strip()}") from error
    return done.stdout
