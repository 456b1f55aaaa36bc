"""Everything that touches the files of a storage domain; run as a child, because a mount may hang.

A program on the standard library alone: `python -S -m host_agent.files VERB`, a JSON request on standard input,
a JSON answer as the last line of standard output. Names are looked up below the domain's own directory and
never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from host_agent.mounts import MOUNTS, mount_problem, mounted

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VOLUME_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(qcow2|raw)")
MARKER = "domain.json"
FOLDERS = ("disks", "staging")
LEASES = "leases"
"""Beside them where the domain holds leases (`host_agent.lease_files`)."""
DIRECTORY_MODE = 0o711
"""libvirt's unprivileged QEMU walks through to the one file that it was given."""
HEAD_BYTES = 65536
TAIL_BYTES = 512
BLOCK_BYTES = 1024 * 1024
SYNC_BYTES = 256 * 1024 * 1024
QCOW2_MAGIC = b"QFI\xfb"
MAX_BACKING, MAX_HEADER = 1023, 2 * 1024**2
"""Of the name of the file below, and where in a qcow2 file it may be."""
F_OFD_GETLK = 36
LOCK_RANGES = ((100, 64), (200, 64))
"""QEMU's image locks (file-posix.c): bytes from 100 say what it does, from 200 what it forbids others."""


class Refusal(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def refuse(kind: str, message: str) -> NoReturn:
    raise Refusal(kind, message)


# Where things are


@contextlib.contextmanager
def folder(root: str, name: str = "") -> Iterator[int]:
    """A descriptor of the domain's directory or of one of its folders."""
    if name and name not in FOLDERS:
        refuse("invalid", f"{name!r} isn't a folder of a storage domain")
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not name:
            yield top
            return
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            yield inner
        finally:
            os.close(inner)
    finally:
        os.close(top)


def checked(name: str) -> str:
    if not NAME.fullmatch(name):
        refuse("invalid", f"{name!r} can't be the name of a volume's file")
    return name


def check_there(root: str) -> None:
    """A file that is absent since its mount was lost is still somewhere."""
    if not os.path.isdir(root):
        refuse("unavailable", f"{root} isn't there: mount the shared storage on this host again")


def opened(directory: int, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Refuses links, devices and directories."""
    try:
        descriptor = os.open(
            checked(name), flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o660, dir_fd=directory
        )
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            refuse("conflict", f"{name} isn't a regular file: remove what is in the volume's place")
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse("conflict", f"{name} isn't a regular file: remove what is in the volume's place")
    return descriptor


# Domains


def connect(request: dict[str, Any], mounts: str = MOUNTS) -> dict[str, Any]:
    """Check, or initialise, a domain's directory and list it."""
    path, domain_id = request["path"], request["domain_id"]
    try:
        top = os.path.realpath(path, strict=True)
        if not stat.S_ISDIR(os.stat(top).st_mode):
            raise NotADirectoryError
    except (FileNotFoundError, NotADirectoryError):
        refuse(
            "not_found",
            f"{path} isn't a directory on this host: make it, or mount the shared storage there, and try again",
        )
    if problem := mount_problem(path, mounted(top, mounts)):
        refuse("conflict", problem)
    root = os.path.join(top, domain_id)
    if request["initialise"] and not os.path.lexists(os.path.join(root, MARKER)):
        initialise(root, domain_id, request["installation"])
    check_marker(path, root, domain_id, request["installation"])
    check_writable(root)
    return {"root": root, **contents(root)}


def report(request: dict[str, Any]) -> dict[str, Any]:
    root = request["root"]
    check_marker(os.path.dirname(root), root, request["domain_id"], request["installation"])
    return {"root": root, **contents(root)}


def initialise(root: str, domain_id: str, installation: str) -> None:
    try:
        for directory in (root, *(os.path.join(root, name) for name in FOLDERS)):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory)
                os.chmod(directory, DIRECTORY_MODE)
        marker = {"domain_id": domain_id, "installation": installation, "version": 1}
        with folder(root) as top:
            write_durably(top, MARKER, json.dumps(marker).encode() + b"\n")
    except PermissionError as error:
        refuse(
            "forbidden",
            f"{root} can't be made: {error.strerror}. Give root the right to write there "
            "(on NFS: export it with no_root_squash)",
        )


def check_marker(path: str, root: str, domain_id: str, installation: str) -> None:
    try:
        with folder(root) as directory:
            descriptor = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
            with open(descriptor, "rb") as file:
                marker = json.loads(file.read(4096))
        found = (marker["domain_id"], marker["installation"])
    except (FileNotFoundError, NotADirectoryError):
        refuse(
            "not_found",
            f"{path} has no storage domain {domain_id}: {root}/{MARKER} is missing. "
            "Is the shared storage mounted there?",
        )
    except (ValueError, KeyError, TypeError):
        refuse(
            "conflict", f"{root}/{MARKER} can't be read as a storage domain's marker: restore it or remove it"
        )
    if found[0] != domain_id:
        refuse("conflict", f"{root} belongs to storage domain {found[0]}, not to {domain_id}")
    if found[1] != installation:
        refuse(
            "conflict",
            f"{root} belongs to another Volery ({found[1]}): two of them on one storage domain would write the "
            "same volumes. Use another directory",
        )


def abandon(request: dict[str, Any]) -> dict[str, Any]:
    """Remove a domain's own directory when it holds nothing but the marker and empty folders; else leave it alone."""
    root = request["root"]
    if not os.path.lexists(root):
        return {}
    if os.path.lexists(os.path.join(root, MARKER)):
        check_marker(os.path.dirname(root), root, request["domain_id"], request["installation"])
    with folder(root) as top:
        inside = set(os.listdir(top))
        if inside - {MARKER, *FOLDERS} or any(
            os.listdir(os.path.join(root, f)) for f in inside & set(FOLDERS)
        ):
            return {}
        for name in inside & set(FOLDERS):
            os.rmdir(name, dir_fd=top)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MARKER, dir_fd=top)
    os.rmdir(root)
    return {}


def check_writable(root: str) -> None:
    for name in FOLDERS:
        with folder(root, name) as directory:
            probe = f".probe-{os.urandom(6).hex()}"  # several hosts may try at once
            try:
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory))
            except OSError as error:
                refuse("forbidden", f"{root}/{name} can't be written: {error.strerror}")
            os.unlink(probe, dir_fd=directory)


def contents(root: str) -> dict[str, Any]:
    """Capacity, the volumes, and what has no business there."""
    usage = os.statvfs(root)
    volumes, strangers = [], []
    with folder(root, "disks") as directory, os.scandir(directory) as entries:
        for entry in entries:
            path = os.path.join(root, "disks", entry.name)
            try:
                if VOLUME_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    volumes.append(volume(directory, entry.name, path))
                else:
                    strangers.append(path)
            except FileNotFoundError:  # deleted while we look
                continue
    with folder(root) as directory:
        own = {MARKER, LEASES, *FOLDERS}
        strangers += [os.path.join(root, name) for name in os.listdir(directory) if name not in own]
    return {
        "capacity_bytes": usage.f_frsize * usage.f_blocks,
        "available_bytes": usage.f_frsize * usage.f_bavail,
        "volumes": volumes,
        "strangers": sorted(strangers)[:1000],
    }


def volume(directory: int, name: str, path: str) -> dict[str, Any]:
    descriptor = opened(directory, name)
    try:
        status = os.fstat(descriptor)
        head = os.pread(descriptor, 32, 0) if name.endswith(".qcow2") else b""
        below = backing(descriptor, head)
    finally:
        os.close(descriptor)
    size = (
        struct.unpack(">Q", head[24:32])[0] if head[:4] == QCOW2_MAGIC and len(head) == 32 else status.st_size
    )
    return {
        "path": path,
        "size_bytes": min(size, 2**63 - 1),
        "used_bytes": status.st_blocks * 512,
        "format": name.rsplit(".", 1)[1],
        "backing": below,
    }


def backing(descriptor: int, head: bytes) -> str:
    """What the header of a qcow2 file calls the file below it; "" is none, as of a raw one."""
    if head[:4] != QCOW2_MAGIC or len(head) < 20:
        return ""
    at, length = struct.unpack(">QI", head[8:20])
    name = os.pread(descriptor, min(length, MAX_BACKING), at) if 0 < at < MAX_HEADER else b""
    return name.decode(errors="replace") or ("?" if at else "")


# Single files


def below(request: dict[str, Any]) -> dict[str, Any]:
    """What these volumes' headers call the files below them; None of a volume that isn't there."""
    return {"names": [_below(*file) for file in request["files"]]}


def _below(root: str, name: str) -> str | None:
    check_there(root)
    try:
        with folder(root, "disks") as directory:
            descriptor = opened(directory, name)
    except FileNotFoundError:
        return None
    try:
        return backing(descriptor, os.pread(descriptor, 32, 0) if name.endswith(".qcow2") else b"")
    finally:
        os.close(descriptor)


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the file is there, its sizes, its first and last bytes, and whether a program has it open as an image."""
    check_there(request["root"])
    try:
        with folder(request["root"], request["folder"]) as directory:
            descriptor = opened(directory, request["name"])
    except FileNotFoundError:
        return {"exists": False}
    try:
        status = os.fstat(descriptor)
        return {
            "exists": True,
            "size_bytes": status.st_size,
            "used_bytes": status.st_blocks * 512,
            "head": os.pread(descriptor, HEAD_BYTES, 0).hex(),
            "tail": os.pread(descriptor, TAIL_BYTES, max(0, status.st_size - TAIL_BYTES)).hex(),
            "in_use": in_use(descriptor),
        }
    finally:
        os.close(descriptor)


def in_use(descriptor: int) -> bool:
    """Whether a QEMU program (also on another NFS client) holds the image's locks."""
    for start, length in LOCK_RANGES:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        try:
            answer = fcntl.fcntl(descriptor, F_OFD_GETLK, question)
        except OSError:  # a file system without locks
            return False
        if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
            return True
    return False


def place(request: dict[str, Any]) -> dict[str, Any]:
    """Give a finished file in `staging` its name in `disks`, durably and at once; `replace` what is there or refuse."""
    source, target = checked(request["staged"]), checked(request["name"])
    with folder(request["root"], "staging") as staging, folder(request["root"], "disks") as disks:
        descriptor = opened(staging, source, os.O_RDWR)
        try:
            os.fchmod(descriptor, 0o660)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if request["replace"]:
            refuse_in_use(disks, target)
            os.rename(source, target, src_dir_fd=staging, dst_dir_fd=disks)
        else:
            rename_fresh(staging, source, disks, target)
        os.fsync(disks)
    return {}


def rename_fresh(staging: int, source: str, disks: int, target: str) -> None:
    """A rename that never replaces: a hard link where the file system has them."""
    try:
        os.link(source, target, src_dir_fd=staging, dst_dir_fd=disks, follow_symlinks=False)
        os.unlink(source, dir_fd=staging)
    except FileExistsError:
        refuse(
            "conflict", f"there is already a file {target} in the volume's place: list the domain's strangers"
        )
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        if lexists(disks, target):
            refuse("conflict", f"there is already a file {target} in the volume's place")
        os.rename(source, target, src_dir_fd=staging, dst_dir_fd=disks)


def lexists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def refuse_in_use(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = opened(directory, name)
        try:
            if in_use(descriptor):
                refuse("conflict", f"{name} is in use: a running VM or an image program has it open")
        finally:
            os.close(descriptor)


def remove(request: dict[str, Any]) -> dict[str, Any]:
    """Remove the file (absent is fine), overwritten with zeros first when `wipe`."""
    check_there(request["root"])
    with contextlib.suppress(FileNotFoundError), folder(request["root"], request["folder"]) as directory:
        name = checked(request["name"])
        refuse_in_use(directory, name)
        if request["wipe"]:
            wipe(directory, name)
        os.unlink(name, dir_fd=directory)
        os.fsync(directory)
    return {}


def wipe(directory: int, name: str) -> None:
    """Zeros over every byte that was ever written; holes have nothing to hide."""
    descriptor = opened(directory, name, os.O_RDWR)
    try:
        size, offset = os.fstat(descriptor).st_size, 0
        zeros = bytes(BLOCK_BYTES)
        while offset < size:
            try:
                offset = os.lseek(descriptor, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            end = os.lseek(descriptor, offset, os.SEEK_HOLE)
            while offset < end:
                offset += os.pwrite(descriptor, zeros[: end - offset], offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(request: dict[str, Any]) -> dict[str, Any]:
    """The file's SHA-256."""
    hashed = hashlib.sha256()
    with (
        folder(request["root"], request["folder"]) as directory,
        open(opened(directory, request["name"]), "rb", buffering=0) as file,
    ):
        buffer = bytearray(BLOCK_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hashed.update(view[:count])
    return {"sha256": hashed.hexdigest()}


def write_durably(directory: int, name: str, data: bytes) -> None:
    """Replace a small file whole: a reader, and a machine that lost power, has the old or the new content."""
    temporary = f"{scratch(name)}{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=directory)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)


def scratch(name: str) -> str:
    """How the names begin under which that file is written."""
    return f".{name}."


def remove_scratch(directory: int, name: str) -> None:
    """What writers of a file left who were killed in the middle. Nobody may be writing it."""
    for entry in os.listdir(directory):
        if entry.startswith(scratch(name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry, dir_fd=directory)


# The program


def say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


VERBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "connect": connect,
    "report": report,
    "abandon": abandon,
    "look": look,
    "below": below,
    "place": place,
    "remove": remove,
    "digest": digest,
}

KINDS = {
    errno.ENOSPC: "exhausted",
    errno.EDQUOT: "exhausted",
    errno.ENOENT: "not_found",
    errno.EACCES: "forbidden",
}


def answer(run: Callable[[], dict[str, Any]], about: str) -> None:
    """Say what `run` returns, or why it was refused, as the last line."""
    try:
        say(run())
    except Refusal as refusal:
        say({"refused": refusal.kind, "message": str(refusal)})
    except OSError as error:
        what = f"{about}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        say({"refused": KINDS.get(error.errno or 0, "unavailable"), "message": what})


def main() -> None:
    os.umask(0o007)
    request = json.load(sys.stdin)
    verb = VERBS[sys.argv[1]]
    answer(lambda: verb(request), f"{sys.argv[1]} in {request.get('root') or request.get('path')} failed")


if __name__ == "__main__":
    main()
