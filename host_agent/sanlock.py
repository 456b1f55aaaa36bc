"""sanlock's own programs: what its daemon is asked, and leases read from the storage itself.

`sanlock client` speaks to the daemon, `sanlock direct` to the storage without it. Neither renews anything.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from host_agent import children
from volery.contracts.errors import Kind, Refused
from volery.contracts.leases import HeldLease, LockspaceReport

PROGRAM = "sanlock"
ASK_SECONDS = 10.0
"""For what the daemon answers from memory, and for one read; beyond it the daemon or the storage hangs."""
_RESULT = re.compile(r"^\w+ done (-?\d+)$", re.MULTILINE)
_HOST_LEASE = re.compile(r"^\d+ +\S+ +\S+ +(?P<timestamp>\d+) +(?P<number>\d+) +\d+ *$", re.MULTILINE)
_LOCKSPACE = re.compile(r"s (?P<name>[^:]+):(?P<number>\d+):")
_RESOURCE = re.compile(r"r (?P<lockspace>[^:]+):(?P<key>[^:]+):.* p (?P<pid>-?\d+)")


@dataclass(frozen=True, slots=True)
class Meaning:
    kind: Kind
    sentence: str


_HELD = Meaning(Kind.CONFLICT, "another host holds it, or held it and may still live")
_AWAY = Meaning(
    Kind.UNAVAILABLE, "sanlock's daemon doesn't answer: start it on this host (systemctl start sanlock)"
)
_STORAGE = Meaning(
    Kind.UNAVAILABLE, "the storage could not be read or written: look at its mount on this host"
)
_DAMAGED = Meaning(Kind.CONFLICT, "what is there isn't this lease: look at the file on the storage")
MEANINGS: Mapping[int, Meaning] = {
    -2: Meaning(
        Kind.CONFLICT, "its daemon doesn't run, or this host has not joined the lockspace: start it, join it"
    ),
    -5: _STORAGE,
    -11: Meaning(Kind.UNAVAILABLE, "it is just being let go by its last holder: try again"),
    -17: Meaning(Kind.CONFLICT, "a process of this host holds it already"),
    -19: _STORAGE,
    -22: Meaning(
        Kind.CONFLICT, "this host is in that lockspace already, with another number or path: leave it first"
    ),
    -28: Meaning(Kind.CONFLICT, "this host has not joined the lockspace: join it first"),
    -104: _AWAY,
    -111: _AWAY,
    -115: Meaning(Kind.UNAVAILABLE, "the lockspace is just being joined or left: try again"),
    -202: _STORAGE,
    -207: _STORAGE,
    -223: _DAMAGED,
    -224: _DAMAGED,
    -226: _DAMAGED,
    -227: _DAMAGED,
    -229: _DAMAGED,
    -243: _HELD,
    -244: _HELD,
    -245: _HELD,
    -262: Meaning(
        Kind.CONFLICT, "another machine uses this host's number in the lockspace: give each its own"
    ),
}
"""By errno, or sanlock_rv.h: the numbers that have a meaning of their own here."""


class SanlockFailed(Refused):
    """sanlock's refusal; its number is the detail `sanlock_code`."""

    def __init__(self, doing: str, code: int) -> None:
        meaning = MEANINGS.get(
            code, Meaning(Kind.UNAVAILABLE, "look at /var/log/sanlock.log on this host and try again")
        )
        super().__init__(
            meaning.kind, f"sanlock could not {doing} (result {code}): {meaning.sentence}", sanlock_code=code
        )
        self.code = code


@dataclass(frozen=True, slots=True)
class Status:
    """What the daemon says of itself (`sanlock client status -D`)."""

    version: str = ""
    name: str = ""
    """What this host is called in host leases."""
    uses_watchdog: bool = False
    lockspaces: tuple[LockspaceReport, ...] = ()
    held: tuple[HeldLease, ...] = ()


@dataclass(frozen=True, slots=True)
class Leader:
    """A lease as it is on the storage (`sanlock direct read_leader`)."""

    values: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str) -> int:
        return int(self.values.get(name, "0"), 0)

    def text(self, name: str) -> str:
        return self.values.get(name, "")


def escaped(path: str) -> str:
    r"""A path inside sanlock's `name:id:path:offset`, where `\:` is a colon."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def lockspace(domain_id: str, number: int, path: str) -> str:
    return f"{domain_id}:{number}:{escaped(path)}:0"


def resource(domain_id: str, key: str, path: str, offset: int = 0) -> str:
    return f"{domain_id}:{key}:{escaped(path)}:{offset}"


async def ask(
    doing: str, *arguments: str, timeout_seconds: float = ASK_SECONDS, pass_fds: Sequence[int] = ()
) -> str:
    """What it wrote. Raises SanlockFailed with its result, Refused(timeout), or Refused without the program."""
    said: list[bytes] = []
    try:
        await children.run(
            [PROGRAM, *arguments],
            timeout_seconds=timeout_seconds,
            pass_fds=pass_fds,
            on_output=said.append,
        )
    except children.ChildTimedOut as failure:
        raise Refused(
            Kind.TIMEOUT,
            f"sanlock did not {doing} within {timeout_seconds:g} s; whether it still will is unknown: look at the"
            " host's leases before trying again",
        ) from failure
    except children.ChildFailed as failure:
        text = b"".join(said).decode(errors="replace")
        raise SanlockFailed(doing, result_of(text, failure.status)) from failure
    text = b"".join(said).decode(errors="replace")
    if (code := result_of(text, 0)) < 0:  # some of its commands end with 0 all the same
        raise SanlockFailed(doing, code)
    return text


def result_of(said: str, status: int) -> int:
    """The last result that it named; else its exit status as a negative number."""
    found = _RESULT.findall(said)
    return int(found[-1]) if found else -abs(status)


async def status() -> Status:
    doing = "say what it holds"
    try:
        return read_status(await ask(doing, "client", "status", "-D"))
    except SanlockFailed as failure:
        if failure.code == -1:  # it named no reason: that is how it says that there is no daemon
            raise SanlockFailed(doing, -errno.ECONNREFUSED) from failure
        raise


def read_status(said: str) -> Status:
    """Blocks of `p pid name`, `s lockspace`, `r resource`, each followed by indented `key=value` lines."""
    blocks: list[tuple[str, dict[str, str]]] = []
    for line in said.splitlines():
        if not line.startswith(" "):
            blocks.append((line.strip(), {}))
        elif blocks:
            name, _, value = line.strip().partition("=")
            blocks[-1][1][name] = value
    own = next(((head, values) for head, values in blocks if head.startswith("daemon ")), ("daemon ", {}))
    return Status(
        version=own[1].get("version_str", ""),
        name=own[0].removeprefix("daemon "),
        uses_watchdog=own[1].get("use_watchdog") == "1",
        lockspaces=tuple(
            _joined(found, values) for head, values in blocks if (found := _LOCKSPACE.match(head)) is not None
        ),
        held=tuple(
            HeldLease(lockspace=found["lockspace"], key=found["key"], pid=max(0, int(found["pid"])))
            for head, values in blocks
            if (found := _RESOURCE.match(head)) is not None
        ),
    )


def _joined(found: re.Match[str], values: Mapping[str, str]) -> LockspaceReport:
    return LockspaceReport(
        domain_id=found["name"],
        host_number=int(found["number"]),
        generation=int(values.get("host_generation", "0")),
        io_timeout_seconds=int(values.get("io_timeout", "0")),
        reset_host=values.get("external_used") == "1",
        failing=values.get("renewal_last_result", "1") != "1" or values.get("space_dead", "0") != "0",
    )


async def read_host(domain_id: str, number: int, path: str) -> Leader:
    """A host's lease. Raises SanlockFailed when the storage can't be read."""
    return await _read("read a host's lease", "-s", lockspace(domain_id, number, path))


async def members(path: str) -> list[int]:
    """Numbers that hosts hold in a lockspace, or held when they died. Raises SanlockFailed when it can't be read."""
    said = await ask("read who is in a lockspace", "direct", "dump", escaped(path))
    if not said.strip().startswith("offset"):
        raise SanlockFailed("read who is in a lockspace", -errno.EIO)
    return [int(found["number"]) for found in _HOST_LEASE.finditer(said) if int(found["timestamp"])]


async def read_lease(domain_id: str, key: str, path: str) -> Leader:
    return await _read("read a lease", "-r", resource(domain_id, key, path))


async def _read(doing: str, kind: str, what: str) -> Leader:
    said = await ask(doing, "direct", "read_leader", kind, what)
    values = {}
    for line in said.splitlines():
        name, _, value = line.partition(" ")
        values[name] = value.strip()
    return Leader(values)
