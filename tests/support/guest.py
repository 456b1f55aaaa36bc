"""A guest of a few megabytes for tests: Debian's cloud kernel and an initrd with busybox and qemu-guest-agent.

Boots in about 3 s under TCG. It counts once a second into /run/tick and onto its serial console (`TICK n`), so
that a test sees whether it went on; says `GUEST-UP` when its agent runs; has a shell on ttyS0.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CACHE = Path("/var/cache/volery-tests")
MODULES = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio-rng",
    "virtio_scsi",
    "sd_mod",
    "sr_mod",
    "isofs",
    "button",
    "evdev",
    "pvpanic-pci",
    "pvpanic-mmio",
    "qemu_fw_cfg",
]

INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /run /tmp /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts; mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /run
for m in $(cat /lib/mod/order); do insmod /lib/mod/$m 2>/dev/null; done
ip link set lo up
name=$(cat /sys/class/dmi/id/product_family 2>/dev/null); [ -n "$name" ] && hostname "$name"
for a in $(cat /proc/cmdline); do case $a in
  ip4=*) ip link set eth0 up; ip addr add ${a#ip4=} dev eth0;;
  dhcp) ip link set eth0 up; udhcpc -i eth0 -n -q;;
esac; done
[ -b /dev/vda ] && mount -t ext4 /dev/vda /mnt 2>/dev/null
for p in /sys/class/virtio-ports/*; do
  [ "$(cat $p/name 2>/dev/null)" = org.qemu.guest_agent.0 ] &&
    qemu-ga -d -m virtio-serial -p /dev/$(basename $p) -t /run -l /run/qga.log -f /run/qga.pid
done
echo "GUEST-UP $(cut -d' ' -f1 /proc/uptime)s $(hostname)" >/dev/console
grep -q acpi-deaf /proc/cmdline || acpid -l /run/acpid.log
( i=0; while :; do i=$((i+1)); echo $i > /run/tick; echo "TICK $i" >/dev/console; sleep 1; done ) &
while :; do setsid cttyhack sh; sleep 1; done
"""
SHUTDOWN = """#!/bin/busybox sh
/bin/sync; umount /mnt 2>/dev/null
case "$*" in *-r*) reboot -f;; *) poweroff -f;; esac
"""
OS_RELEASE = 'NAME="Volery test guest"\nPRETTY_NAME="Volery test guest 1"\nID=volery-test\nVERSION_ID="1"\n'


@dataclass(frozen=True)
class Guest:
    kernel: Path
    initrd: Path


def guest(cache: Path = CACHE) -> Guest:
    """The guest's kernel and initrd, built once per machine (about 10 s) and whenever this module changed."""
    cache.mkdir(parents=True, exist_ok=True)
    made = Guest(cache / "vmlinuz", cache / "initrd.gz")
    stamp = cache / "stamp"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = Path(__file__).read_text()
        if not (stamp.exists() and stamp.read_text() == source and made.initrd.exists()):
            _build(cache, made)
            stamp.write_text(source)
    return made


def _build(cache: Path, made: Guest) -> None:
    packages = cache / "packages"
    for package in (_kernel_package(), "qemu-guest-agent"):
        if not (packages / package).exists():
            _unpack(package, packages)
    kernel_root = packages / _kernel_package()
    image = next((kernel_root / "boot").glob("vmlinuz-*"))
    shutil.copy(image, made.kernel)
    version = image.name.removeprefix("vmlinuz-")

    tree = cache / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for directory in ("bin", "sbin", "lib/mod", "etc/acpi/PWRF", "proc", "sys", "dev", "run"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", tree / "bin/busybox")
    agent = packages / "qemu-guest-agent/usr/sbin/qemu-ga"
    shutil.copy(agent, tree / "bin/qemu-ga")
    for library in _libraries(agent):
        target = tree / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    _modules(kernel_root, version, tree / "lib/mod")
    _script(tree / "init", INIT)
    _script(tree / "sbin/shutdown", SHUTDOWN)
    _script(tree / "etc/acpi/PWRF/00000080", "#!/bin/busybox sh\n/sbin/shutdown -h now\n")
    (tree / "etc/os-release").write_text(OS_RELEASE)
    (tree / "etc/passwd").write_text("root::0:0:root:/:/bin/sh\n")
    names = b"\0".join(str(p.relative_to(tree)).encode() for p in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--null", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names, stdout=-1, check=True
    ).stdout
    made.initrd.write_bytes(gzip.compress(archive, 6))


def _kernel_package() -> str:
    shown = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"Depends: (linux-image-\S+)", shown)
    assert match, "apt knows no linux-image-cloud-amd64: run apt-get update"
    return match[1]


def _unpack(package: str, packages: Path) -> None:
    work = packages / f"{package}.new"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True, capture_output=True)
    archive = next(work.glob("*.deb"))
    subprocess.run(["dpkg", "-x", archive, work], check=True)
    archive.unlink()
    work.rename(packages / package)


def _libraries(program: Path) -> list[Path]:
    shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "not found" not in shown, shown
    return [Path(p) for p in re.findall(r"(/\S+) \(0x", shown)]


def _modules(kernel_root: Path, version: str, target: Path) -> None:
    subprocess.run(["depmod", "-b", kernel_root, version], check=True)
    order: list[str] = []
    for module in MODULES:
        shown = subprocess.run(
            ["modprobe", "-d", kernel_root, "-S", version, "--show-depends", module],
            capture_output=True,
            text=True,
        ).stdout
        for path in re.findall(r"insmod (\S+)", shown):
            if (name := os.path.basename(path)) not in order:
                order.append(name)
                shutil.copy(path, target / name)
    (target / "order").write_text("\n".join(order))


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
