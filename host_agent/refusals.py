"""libvirt's errors as refusals: a kind by error code, and a sentence that says what to do."""

from __future__ import annotations

import re
from enum import IntEnum

from volery.contracts.errors import Kind, Refused
from volery.contracts.leases import IMAGE_HELD


class LibvirtError(IntEnum):
    """The part of virErrorNumber that has a meaning of its own here; its numbers never change."""

    NO_MEMORY = 2
    NO_SUPPORT = 3
    INVALID_ARG = 8
    OPERATION_FAILED = 9
    XML_ERROR = 27
    NO_DOMAIN = 42
    NO_NETWORK = 43
    AUTH_FAILED = 45
    NO_NODE_DEVICE = 53
    OPERATION_INVALID = 55
    NO_SECRET = 66
    CONFIG_UNSUPPORTED = 67
    OPERATION_TIMEOUT = 68
    ARGUMENT_UNSUPPORTED = 74
    OPERATION_ABORTED = 78
    MIGRATE_UNSAFE = 81
    OPERATION_UNSUPPORTED = 84
    AGENT_UNRESPONSIVE = 86
    RESOURCE_BUSY = 87
    ACCESS_DENIED = 88
    XML_INVALID_SCHEMA = 92
    CPU_INCOMPATIBLE = 91
    AGENT_UNSYNCED = 97
    DEVICE_MISSING = 99
    AGENT_COMMAND_TIMEOUT = 112
    AGENT_COMMAND_FAILED = 113


_CONFIGURE = "change the VM's configuration"
_ELSEWHERE = "choose what this host supports, or another host"

MEANINGS: dict[LibvirtError, tuple[Kind, str]] = {
    LibvirtError.NO_MEMORY: (Kind.EXHAUSTED, "free memory on the host"),
    LibvirtError.NO_SUPPORT: (Kind.INVALID, _ELSEWHERE),
    LibvirtError.INVALID_ARG: (Kind.INVALID, _CONFIGURE),
    LibvirtError.OPERATION_FAILED: (Kind.CONFLICT, "change what the message names and try again"),
    LibvirtError.XML_ERROR: (Kind.INVALID, _CONFIGURE),
    LibvirtError.NO_DOMAIN: (Kind.NOT_FOUND, "start the VM first"),
    LibvirtError.NO_NETWORK: (Kind.NOT_FOUND, "apply the host's networks again"),
    LibvirtError.AUTH_FAILED: (Kind.FORBIDDEN, "check the credentials"),
    LibvirtError.NO_NODE_DEVICE: (Kind.NOT_FOUND, "look which devices the host has: `volery host devices`"),
    LibvirtError.OPERATION_INVALID: (Kind.CONFLICT, "look at the VM's state and try again"),
    LibvirtError.NO_SECRET: (Kind.NOT_FOUND, "connect the storage domain on this host again"),
    LibvirtError.CONFIG_UNSUPPORTED: (Kind.INVALID, _ELSEWHERE),
    LibvirtError.OPERATION_TIMEOUT: (Kind.TIMEOUT, "try again, or reset the VM if it does not react"),
    LibvirtError.ARGUMENT_UNSUPPORTED: (Kind.INVALID, _ELSEWHERE),
    LibvirtError.OPERATION_ABORTED: (Kind.CONFLICT, "start it again if it is still wanted"),
    LibvirtError.MIGRATE_UNSAFE: (Kind.CONFLICT, "put the VM's disks on shared storage"),
    LibvirtError.OPERATION_UNSUPPORTED: (Kind.INVALID, _ELSEWHERE),
    LibvirtError.AGENT_UNRESPONSIVE: (Kind.UNAVAILABLE, "start the guest agent in the VM"),
    LibvirtError.RESOURCE_BUSY: (Kind.CONFLICT, "try again when the other operation has ended"),
    LibvirtError.ACCESS_DENIED: (Kind.FORBIDDEN, "let the agent run as root"),
    LibvirtError.XML_INVALID_SCHEMA: (Kind.INVALID, _CONFIGURE),
    LibvirtError.CPU_INCOMPATIBLE: (Kind.INVALID, "choose a CPU model that both hosts have"),
    LibvirtError.AGENT_UNSYNCED: (Kind.UNAVAILABLE, "restart the guest agent in the VM if it goes on"),
    LibvirtError.DEVICE_MISSING: (Kind.NOT_FOUND, "it may have been unplugged already"),
    LibvirtError.AGENT_COMMAND_TIMEOUT: (Kind.TIMEOUT, "restart the guest agent in the VM"),
    LibvirtError.AGENT_COMMAND_FAILED: (Kind.CONFLICT, "see the message"),
}


_LOCKED = re.compile(r'Failed to get (?:shared )?"[^"]*" lock')
_IMAGE = re.compile(r"using the image \[([^\]]+)\]")
"""QEMU's own words (block/file-posix.c, block.c); it has no others in other languages."""


OF_THIS_HOST = {
    "hugetlbfs": "mount hugetlbfs for pages of this size on the host (systemd does so at /dev/hugepages for the default size),"
    " and restart libvirtd, which looks only when it starts",
    "hugepages are disabled by administrator": "take the empty hugetlbfs_mount out of the host's /etc/libvirt/qemu.conf, and"
    " restart libvirtd",
    "unable to map backing store for guest RAM": "end what uses the host's huge pages, or set more aside there",
}
"""libvirt's and QEMU's words for what another host may well have, and what to do about it on this one."""


class Disconnected(Refused):
    """libvirtd went away, or isn't there: what was asked may or may not have happened."""

    def __init__(self, doing: str, error: str) -> None:
        super().__init__(
            Kind.UNAVAILABLE,
            f"libvirt was not reachable to {doing}: {error.rstrip('.')}. Whether it happened is unknown: it is looked"
            " at again as soon as libvirtd answers; start libvirtd on the host if it doesn't",
        )


def refused(doing: str, code: int, error: str) -> Refused:
    """A libvirt error: what could not be done, why, and what to do. `code` is kept as detail `libvirt_code`."""
    if _LOCKED.search(error or ""):
        found = _IMAGE.search(error)
        return image_held(doing, found[1] if found else "", libvirt_code=code)
    for pattern, advice in OF_THIS_HOST.items():
        if pattern in (error or ""):
            reason = error.strip().rstrip(".")
            return Refused(
                Kind.EXHAUSTED, f"libvirt could not {doing}: {reason}; {advice}", libvirt_code=code
            )
    kind, advice = Kind.INTERNAL, "see libvirtd's log on the host"
    if code in MEANINGS:
        kind, advice = MEANINGS[LibvirtError(code)]
    reason = (error or f"error {code}").rstrip(".")
    return Refused(kind, f"libvirt could not {doing}: {reason}; {advice}", libvirt_code=code)


def image_held(doing: str, path: str, **details: object) -> Refused:
    """`path` of the disk's file, "" when it isn't known."""
    image = f"image {path}" if path else "image of one of its disks"
    return Refused(
        Kind.CONFLICT,
        f"libvirt could not {doing}: another QEMU program has locked the {image}, on this host or on another one that uses"
        " the same storage. If that host died, its file server still keeps its locks and forgets them in its own time (NFS 4:"
        " usually 90 s): try again then. Otherwise end the program that uses the image",
        **{**details, "rule": IMAGE_HELD},
    )


def timed_out(doing: str, seconds: float) -> Refused:
    """A call that was given up: its outcome is unknown."""
    return Refused(
        Kind.TIMEOUT,
        f"libvirt did not {doing} within {seconds:g} s. Whether it still will is unknown: look at the VM's state"
        " before trying again",
        seconds=seconds,
    )


def is_libvirt(problem: Refused, *codes: LibvirtError) -> bool:
    """Whether libvirt refused with one of these codes."""
    return problem.details.get("libvirt_code") in codes
