"""The system calls behind a namespace, which Python 3.11's standard library doesn't have."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x80000

MNT_DETACH = 0x2

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, action: str, path: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}", path)


def unshare(flags: int) -> None:
    """Leaves the namespaces named by CLONE_NEW* flags for new ones. Raises OSError."""
    _checked(_libc.unshare(ctypes.c_int(flags)), f"unshare {flags:#x}")


def join_namespace(path: str) -> None:
    """Moves this process into the namespace that `path` (a /proc/*/ns or /run/netns file) names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(0)), "setns", path)
    finally:
        os.close(descriptor)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError with the target's path."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount {source}", target)


def bind(source: str, target: str) -> None:
    """Makes `source` (a directory or a file) visible at `target`. Raises OSError."""
    mount(source, target, flags=MS_BIND)


def detach(target: str) -> None:
    """Takes a mount out of this namespace at once, whatever still uses it. Raises OSError."""
    _checked(_libc.umount2(target.encode(), ctypes.c_int(MNT_DETACH)), "umount", target)


def set_hostname(name: str) -> None:
    raw = name.encode()
    _checked(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), f"sethostname {name}")
