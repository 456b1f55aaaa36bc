"""qemu-img, and what makes an image fit to be opened: its format told by its bytes, nothing outside it named.

An image from a stranger is never probed by QEMU: the format is decided here from its magic and then forced.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from host_agent import children, leased
from host_agent.children import ChildFailed, ChildTimedOut, Limits
from host_agent.leased import FREE, Hold
from volery.contracts.domain import ChainSource, FileSource, IscsiSource, VolumeSource
from volery.contracts.errors import Kind, Refused, invalid

MAX_VIRTUAL_BYTES = 64 * 1024**4
"""No disk is larger, whoever asks: qcow2 metadata for more would not fit the limits below."""
INSPECT_LIMITS = Limits(cpu_seconds=30, address_space_bytes=1024**3)
CHECK_LIMITS = Limits(cpu_seconds=600, address_space_bytes=2 * 1024**3)
CONVERT_LIMITS = Limits(cpu_seconds=24 * 3600, address_space_bytes=2 * 1024**3)
INSPECT_SECONDS = 60.0
SECTOR_BYTES = 512

# (offset, magic, what it is): the first that matches decides.
MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb\x00\x00\x00\x02", "qcow2"),
    (0, b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
    (0, b"QFI\xfb", "qcow"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk3"),
    (0, b"# Disk DescriptorFile", "vmdk-descriptor"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\x00", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"BZh", "bzip2"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-zip"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"Rar!", "rar"),
    (257, b"ustar", "tar"),
    (0, b"\x7fELF", "program"),
    (0, b"%PDF", "PDF"),
)
IMPORTABLE = frozenset({"raw", "qcow2", "vmdk", "vdi", "vhdx"})
PACKED = frozenset({"gzip", "xz", "bzip2", "zstd", "7-zip", "zip", "rar", "tar"})
TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]{16,}")


Node = dict[str, Any]
"""A QEMU block node, as its JSON has it."""
SOURCE_SECRET, TARGET_SECRET = "chap", "chap-target"
"""What QEMU calls the passwords inside one of its processes."""


class ImageInfo(msgspec.Struct, rename="kebab"):
    """The fields of `qemu-img info --output=json` that decide."""

    format: str
    virtual_size: int
    actual_size: int = 0
    backing_filename: str = ""
    full_backing_filename: str = ""
    encrypted: bool = False
    format_specific: dict[str, Any] = {}


def detect(head: bytes, size_bytes: int) -> str:
    """The image's format by its first bytes (at least 4 KiB of them where there are so many).

    Raises Refused(invalid) for what can't be a disk image.
    """
    if not size_bytes:
        raise invalid("the image is empty: nothing was sent")
    found = next((name for at, magic, name in MAGICS if head[at : at + len(magic)] == magic), "raw")
    if found in PACKED:
        raise invalid(f"this is a {found} archive, not a disk image: unpack it first", format=found)
    if found in IMPORTABLE - {"raw"}:
        return found
    if found != "raw":
        raise invalid(
            f"the image's format is {found}: only {', '.join(sorted(IMPORTABLE))} are taken; convert it with qemu-img",
            format=found,
        )
    if TEXT.fullmatch(head[:512]):
        raise invalid(
            "this is text, not a disk image: the address may have answered with a page instead of a file"
        )
    if size_bytes % SECTOR_BYTES:
        raise invalid(
            f"this isn't a disk image: no known format, and its {size_bytes} bytes aren't whole sectors of 512 bytes; "
            "a raw image may have been cut short"
        )
    return "raw"


def refuse_header(head: bytes, format: str, size_bytes: int, max_bytes: int) -> None:
    """What the first bytes alone forbid: read here, so that QEMU never follows a name that a stranger wrote.

    Raises Refused(invalid).
    """
    if format == "qcow2":
        _refuse_qcow2(head, max_bytes)
    if format == "vmdk" and struct.unpack_from("<Q", head.ljust(20, b"\0"), 12)[0] == 0:
        raise invalid(
            "the image's data is in other files: convert it with `qemu-img convert` first", rule="extents"
        )
    if format == "vdi":
        header = head.ljust(512, b"\0")
        data_offset, block_bytes = (
            struct.unpack_from("<I", header, 0x158)[0],
            struct.unpack_from("<I", header, 0x178)[0],
        )
        allocated = struct.unpack_from("<I", header, 0x184)[0]
        if data_offset + block_bytes * allocated > size_bytes:
            raise invalid("the image was cut short: send it again", rule="truncated")


def _refuse_qcow2(head: bytes, max_bytes: int) -> None:
    if len(head) < 72:
        raise invalid("the image was cut short: its header isn't whole", rule="truncated")
    version, backing_at, backing_length = struct.unpack_from(">IQI", head, 4)
    virtual, crypt = struct.unpack_from(">QI", head, 24)
    features = struct.unpack_from(">Q", head, 72)[0] if version >= 3 and len(head) >= 80 else 0
    backing = head[backing_at : backing_at + min(backing_length, 1023)] if backing_at else b""
    refuse_facts(
        virtual_bytes=virtual,
        max_bytes=max_bytes,
        backing=backing.decode(errors="replace") or ("?" if backing_at else ""),
        data_file=bool(features & QCOW2_EXTERNAL_DATA),
        encrypted=crypt != 0,
        corrupt=bool(features & QCOW2_CORRUPT),
    )


def refuse_info(info: ImageInfo, detected: str, max_bytes: int) -> None:
    """What qemu-img found out beyond the header. Raises Refused(invalid)."""
    specific = info.format_specific.get("data", {})
    if info.format != detected:
        raise invalid(f"the image says {info.format} where its bytes say {detected}", rule="format")
    refuse_facts(
        virtual_bytes=info.virtual_size,
        max_bytes=max_bytes,
        backing=info.full_backing_filename or info.backing_filename,
        data_file=bool(specific.get("data-file")) or bool(specific.get("data-file-raw")),
        encrypted=info.encrypted or "encrypt" in specific,
        corrupt=bool(specific.get("corrupt")),
        elsewhere=len(specific.get("extents", [])) > 1
        or specific.get("create-type", "monolithicSparse") not in VMDK_WHOLE,
    )


def refuse_facts(
    *,
    virtual_bytes: int,
    max_bytes: int,
    backing: str,
    data_file: bool,
    encrypted: bool,
    corrupt: bool,
    elsewhere: bool = False,
) -> None:
    """Raises Refused(invalid) when an image names anything outside itself or claims an absurd size."""
    limit = min(max_bytes or MAX_VIRTUAL_BYTES, MAX_VIRTUAL_BYTES)
    flatten = "flatten it with `qemu-img convert` first"
    # (the rule, whether it refuses, the sentence)
    rules: tuple[tuple[str, bool, str], ...] = (
        (
            "backing_file",
            bool(backing),
            f"the image has a backing file ({_shown(backing)}) and would show that file of the host to a guest: {flatten}",
        ),
        ("data_file", data_file, f"the image keeps its data in another file: {flatten}"),
        ("extents", elsewhere, f"the image's data is spread over other files: {flatten}"),
        ("encrypted", encrypted, "the image is encrypted: decrypt it first"),
        ("corrupt", corrupt, "the image is marked as corrupt: repair it with `qemu-img check -r all` first"),
        (
            "size",
            virtual_bytes > limit,
            f"the image claims a disk of {virtual_bytes} bytes; here at most {limit} are allowed",
        ),
        ("empty", virtual_bytes <= 0, "the image holds a disk of 0 bytes"),
    )
    for rule, refuses, sentence in rules:
        if refuses:
            raise invalid(sentence, rule=rule, virtual_size_bytes=virtual_bytes)


VMDK_WHOLE = frozenset({"monolithicSparse", "streamOptimized"})
QCOW2_CORRUPT = 0x2
QCOW2_EXTERNAL_DATA = 0x4
BACKED = frozenset({"qcow2", "vmdk"})


def _shown(text: str) -> str:
    """A stranger's text, fit for a sentence."""
    return "".join(c if c.isprintable() else "?" for c in text)[:120]


def file_node(path: str, format: str) -> Node:
    """QEMU's block node of a file, its format forced and no backing file opened."""
    node: Node = {"driver": format, "file": {"driver": "file", "filename": path}}
    return node | {"backing": None} if format in BACKED else node


def chain_node(source: ChainSource) -> Node:
    """QEMU's block node of a volume over those below it, each with its format forced."""
    below: Node | None = None
    for file in reversed(source.backing):
        node = file_node(file.path, file.format)
        below = node | {"backing": below} if below is not None else node
    return file_node(source.path, source.format) | {"backing": below}


def source_node(source: VolumeSource) -> Node:
    """QEMU's block node of a volume; an iSCSI password is a secret that `secrets` gives by the same name."""
    if isinstance(source, ChainSource):
        return chain_node(source)
    if isinstance(source, FileSource):
        return file_node(source.path, source.format)
    login = {"user": source.chap_user, "password-secret": SOURCE_SECRET} if source.chap_user else {}
    lun = {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": source.portal,
        "target": source.iqn,
        "lun": source.lun,
    }
    return {"driver": "raw", "file": lun | login}


def with_secret(node: Node, name: str) -> Node:
    """The node of an iSCSI volume with its password under another name: a copy may need two."""
    lun = node["file"]
    return node | {"file": lun | {"password-secret": name}} if "password-secret" in lun else node


def address(node: Node) -> str:
    """The node as qemu-img takes it in place of a file name."""
    return "json:" + msgspec.json.encode(node).decode()


@contextlib.contextmanager
def secrets(
    source: VolumeSource | None, name: str = SOURCE_SECRET
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Arguments and descriptors that give QEMU a volume's CHAP password without showing it."""
    if not isinstance(source, IscsiSource) or not source.chap_user:
        yield [], ()
        return
    with children.secret_descriptor(source.chap_password) as descriptor:
        yield ["--object", f"secret,id={name},file=/proc/self/fd/{descriptor}"], (descriptor,)


async def qemu_img(
    verb: str,
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    limits: Limits = INSPECT_LIMITS,
    pass_fds: Sequence[int] = (),
    hold: Hold = FREE,
    on_progress: Callable[[float], None] | None = None,
) -> bytes:
    """What qemu-img said. Raises Refused with a sentence about what it refused."""
    on_output = progress_reader(on_progress) if on_progress is not None else None
    try:
        return await leased.run_holding(
            hold,
            ["qemu-img", verb, *arguments],
            timeout_seconds=timeout_seconds,
            limits=limits,
            pass_fds=pass_fds,
            on_output=on_output,
        )
    except ChildFailed as failure:
        raise explained(failure, verb) from failure


# (what qemu-img says, the kind, what it means and what to do)
COMPLAINTS: tuple[tuple[str, Kind, str], ...] = (
    (r'Failed to get .*lock', Kind.CONFLICT, "the volume is in use: a running VM or another image program has it open"),
    (r"No space left|Disk quota exceeded", Kind.EXHAUSTED, "the storage is full: free space on it, or use another storage domain"),
    (r"CHAP|Authentication failure|login|Login", Kind.FORBIDDEN, "the iSCSI target refused the login: check the CHAP user and password"),
    (r"iSCSI|Failed to connect", Kind.UNAVAILABLE, "the iSCSI target can't be reached, or has no such LUN"),
    (r"No such file", Kind.NOT_FOUND, "the volume isn't there"),
    (r"Permission denied|Read-only file system", Kind.FORBIDDEN, "the storage can't be written"),
)  # fmt: skip


def explained(failure: ChildFailed, verb: str) -> Refused:
    if isinstance(failure, ChildTimedOut):
        return Refused(Kind.TIMEOUT, f"qemu-img {verb} was ended: {failure.reason}; the storage may hang")
    reason = re.sub(r"^qemu-img: ", "", failure.reason)
    for pattern, kind, sentence in COMPLAINTS:
        if re.search(pattern, reason):
            return Refused(kind, f"{sentence} (qemu-img {verb}: {_brief(reason)})")
    return Refused(Kind.INVALID, f"qemu-img {verb} failed: {_brief(reason)}")


def _brief(reason: str) -> str:
    """Without the JSON that names the node: it is long and repeats what the request said."""
    return re.sub(r"'?json:\{.*\}'?", "the volume", reason)[:300]


def progress_reader(report: Callable[[float], None]) -> Callable[[bytes], None]:
    """Turns `    (12.34/100%)\\r` into calls."""

    def read(piece: bytes) -> None:
        found = re.findall(rb"\((\d+\.\d+)/100%\)", piece)
        if found:
            report(float(found[-1]))

    return read


async def info(node: Node, source: VolumeSource | None = None, *, shared: bool = True) -> ImageInfo:
    """What qemu-img says of an image, within bounds of time, CPU and memory. What is below it isn't opened for that, and
    may not be named then."""
    alone = node | {"backing": None} if "backing" in node else node
    with secrets(source) as (arguments, descriptors):
        output = await qemu_img(
            "info",
            ["--output=json", *(["-U"] if shared else []), *arguments, address(alone)],
            timeout_seconds=INSPECT_SECONDS,
            pass_fds=descriptors,
        )
    return msgspec.json.decode(output, type=ImageInfo)


class CheckResult(msgspec.Struct, rename="kebab"):
    """Of `qemu-img check --output=json`."""

    image_end_offset: int = 0


LEAKS_ONLY = 3
"""qemu-img check's status for space that is merely lost."""


async def check(path: str, format: str, size_bytes: int, *, timeout_seconds: float) -> None:
    """Raises Refused(invalid) for an image whose own tables are wrong, or that was cut short.

    Without it a qcow2 file that lost its end is read as zeros there, and nobody notices.
    """
    if format == "raw":
        return
    try:
        output = await children.run(
            ["qemu-img", "check", "--output=json", address(file_node(path, format))],
            timeout_seconds=timeout_seconds,
            limits=CHECK_LIMITS,
        )
        end = msgspec.json.decode(output, type=CheckResult).image_end_offset
    except ChildTimedOut as failure:
        raise explained(failure, "check") from failure
    except ChildFailed as failure:
        if failure.status == LEAKS_ONLY:
            return
        raise invalid(
            f"the image is damaged or was cut short: qemu-img check says {_brief(failure.reason)}",
            rule="damaged",
        ) from failure
    if end > size_bytes:
        raise invalid(
            f"the image was cut short: it has {size_bytes} bytes of {end}; send it again", rule="truncated"
        )


async def examine(
    path: str, head: bytes, size_bytes: int, max_bytes: int, *, timeout_seconds: float
) -> ImageInfo:
    """What a stranger's image file is, proven harmless. Raises Refused(invalid) when it isn't."""
    format = detect(head, size_bytes)
    refuse_header(head, format, size_bytes, max_bytes)
    found = await info(file_node(path, format))
    refuse_info(found, format, max_bytes)
    await check(path, format, size_bytes, timeout_seconds=timeout_seconds)
    return found
