"""Orders about leases: join and leave lockspaces, make and remove leases, say what is held, read another host's.

Nothing here renews a lease or ends what held one: that is sanlock's, and goes on without the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from host_agent import children, leased, sanlock, watchdog
from host_agent.action import Action, Host, Running, whole
from host_agent.children import ChildFailed
from host_agent.config import AgentConfig
from host_agent.files import LEASES
from host_agent.lease_files import LEASE_NAME
from host_agent.places import FILE_SECONDS, connected
from host_agent.sanlock import Leader, SanlockFailed
from volery.contracts.base import Done
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.ids import is_id
from volery.contracts.leases import (
    CREATE_LEASE,
    DEFAULT_IO_TIMEOUT_SECONDS,
    DELETE_LEASE,
    FREE_HOST_LEASE,
    JOIN_LOCKSPACE,
    LEASE_BYTES,
    LEASE_TAKEN,
    LEAVE_LOCKSPACE,
    MAX_HOST_NUMBER,
    READ_HOST_LEASE,
    REPORT_LEASES,
    CreateLease,
    DeleteLease,
    FreeHostLease,
    HostLeaseReading,
    HostLeaseReadings,
    JoinLockspace,
    LeaseAbility,
    LeasesReport,
    LeaveLockspace,
    LockspaceReport,
    ReadHostLease,
    ReportLeases,
    Watchdog,
    dead_seconds,
)
from volery.contracts.volume_orders import DirectoryLocation
from volery.runtime.clock import monotonic

LOCKSPACE = "lockspace"
LOOK_AGAIN_SECONDS = 0.2
MAX_WAIT_SECONDS = 240.0
FORMER_SECONDS = 2.0
"""How long an earlier attempt to free a lease is waited for before the order says that its outcome is unknown."""
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
PLUGINS = ("/usr/lib/x86_64-linux-gnu/libvirt", "/usr/lib64/libvirt", "/usr/lib/libvirt")
_LOCK_MANAGER = re.compile(r'^\s*lock_manager\s*=\s*"(\w+)"', re.MULTILINE)


class _LeaseFile(msgspec.Struct):
    """Request to `host_agent.lease_files`."""

    root: str
    name: str
    draft: str = ""
    size_bytes: int = LEASE_BYTES
    domain_id: str = ""
    installation: str = ""


class _Found(msgspec.Struct):
    exists: bool


# Joining and leaving


async def join(host: Host, order: JoinLockspace, running: Running) -> LockspaceReport:
    """Joined already with the same number is a success. Raises Refused: no such domain, another number, storage."""
    if not 1 <= order.host_number <= MAX_HOST_NUMBER:
        raise invalid(
            f"{order.host_number} can't be a host's number in a lockspace: give 1 to {MAX_HOST_NUMBER}"
        )
    if not 1 <= order.io_timeout_seconds <= 60:
        raise invalid(
            f"an io_timeout of {order.io_timeout_seconds} s can't be used: give 1 to 60 s (usual: 10)"
        )
    place = locate(host.config, order.domain_id, order.path, LOCKSPACE)
    if (now := await joined(order.domain_id)) is None:
        await _prepare(host, order, place)
        now = await _joining(order, place)
    if now.host_number != order.host_number:
        raise conflict(
            f"this host is number {now.host_number} in the lockspace of storage domain {order.domain_id}, not"
            f" {order.host_number}: leave it first, with none of its leases held",
            host_number=now.host_number,
        )
    if now.reset_host != order.reset_host:
        used = "1" if order.reset_host else "0"
        await sanlock.ask(
            "set whether a lost lease resets this host",
            "client",
            "set_config",
            "-s",
            order.domain_id,
            "-u",
            used,
        )
    report = await joined(order.domain_id)
    if report is None:
        raise conflict(
            f"the lockspace of storage domain {order.domain_id} was lost as soon as it was joined: try again"
        )
    return report


async def _joining(order: JoinLockspace, place: _LeaseFile) -> LockspaceReport:
    """Where this host's former boot held the number under another name, sanlock waits until that boot is dead."""
    what = sanlock.lockspace(order.domain_id, order.host_number, _path(place))
    doing = f"join the lockspace of storage domain {order.domain_id} as number {order.host_number}"
    seconds = dead_seconds(DEFAULT_IO_TIMEOUT_SECONDS) + dead_seconds(order.io_timeout_seconds)
    try:
        await sanlock.ask(
            doing,
            *("client", "add_lockspace", "-s", what, "-o", str(order.io_timeout_seconds)),
            timeout_seconds=seconds,
        )
    except SanlockFailed as failure:
        if failure.code not in (-17, -115):  # joined, or being joined, by an order that was interrupted
            raise
    deadline = monotonic() + seconds
    while (now := await joined(order.domain_id)) is None or not now.generation:
        if monotonic() > deadline:
            raise Refused(
                Kind.TIMEOUT, f"sanlock did not {doing} within {seconds} s: look at /var/log/sanlock.log"
            )
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
    return now


async def _prepare(host: Host, order: JoinLockspace, place: _LeaseFile) -> None:
    if (await _ask("look", place, _Found)).exists:
        return
    if not order.initialise:
        raise Refused(
            Kind.NOT_FOUND,
            f"storage domain {order.domain_id} has no lockspace at {order.path}: look whether the right storage is"
            " mounted there; make one only if the domain never had one",
        )
    what = sanlock.lockspace(order.domain_id, 0, "{}")
    await _make(host, place, "-s", what, "-o", str(order.io_timeout_seconds))


async def joined(domain_id: str) -> LockspaceReport | None:
    """This host's place in the domain's lockspace."""
    lockspaces = (await sanlock.status()).lockspaces
    return next((one for one in lockspaces if one.domain_id == domain_id), None)


async def lockspaces() -> dict[str, LockspaceReport]:
    """Those that this host has joined, by storage domain; none where sanlock doesn't answer."""
    try:
        return {one.domain_id: one for one in (await sanlock.status()).lockspaces}
    except Refused:
        return {}


async def leave(host: Host, order: LeaveLockspace, running: Running) -> Done:
    """Not joined is a success."""
    place = locate(host.config, order.domain_id, order.path, LOCKSPACE)
    status = await sanlock.status()
    now = next((one for one in status.lockspaces if one.domain_id == order.domain_id), None)
    if now is None:
        return Done()
    if held := sorted(lease.key for lease in status.held if lease.lockspace == order.domain_id):
        raise conflict(
            f"this host holds {len(held)} leases of storage domain {order.domain_id} ({', '.join(held[:5])}), whose VMs"
            " or tools sanlock would kill: move or stop them first",
            held=held[:50],
        )
    doing = f"leave the lockspace of storage domain {order.domain_id}"
    await sanlock.ask(doing, "client", "set_config", "-s", order.domain_id, "-u", "0")
    what = sanlock.lockspace(order.domain_id, now.host_number, _path(place))
    await sanlock.ask(doing, "client", "rem_lockspace", "-s", what, timeout_seconds=120.0)
    return Done()


# Leases


async def create(host: Host, order: CreateLease, running: Running) -> Done:
    """Raises Refused(conflict) when something else has its name."""
    await _create(host, order)
    return Done()


async def _create(host: Host, order: CreateLease) -> None:
    place = _of_key(host.config, order.domain_id, order.key, order.path)
    if not (await _ask("look", place, _Found)).exists:
        await _make(host, place, "-r", sanlock.resource(order.domain_id, order.key, "{}"))
    leader = await sanlock.read_lease(order.domain_id, order.key, _path(place))
    if (leader.text("space_name"), leader.text("resource_name")) != (order.domain_id, order.key):
        raise conflict(f"{order.path} isn't the lease of {order.key}: look at the file on the storage")


async def ensure(host: Host, lease: DomainLease) -> None:
    """A volume's lease is there to be held. Raises Refused where this host could hold none of its storage domain's."""
    if await joined(lease.lockspace) is None:
        raise Refused(
            Kind.UNAVAILABLE,
            f"volume {lease.key} can't be written by this host: it has not joined the lockspace of storage domain "
            f"{lease.lockspace}; look at the domain's lease problems",
            key=lease.key,
        )
    await _create(host, CreateLease(domain_id=lease.lockspace, key=lease.key, path=lease.path))


async def delete(host: Host, order: DeleteLease, running: Running) -> Done:
    """Held while it is removed, so that nobody takes it meanwhile. One that isn't there is a success."""
    place = _of_key(host.config, order.domain_id, order.key, order.path)
    if not (await _ask("look", place, _Found)).exists:
        return Done()
    lease = DomainLease(lockspace=order.domain_id, key=order.key, path=_path(place))
    removing = children.python_arguments("host_agent.lease_files", "discard")
    await leased.run(
        lease,
        removing,
        timeout_seconds=FILE_SECONDS,
        stdin=msgspec.json.encode(place),
        environment=children.PYTHON_ENVIRONMENT,
    )
    return Done()


async def _make(host: Host, place: _LeaseFile, kind: str, what: str, *options: str) -> None:
    """Writes a draft and gives it its name; whoever was first wins. `what` has `{}` for its path."""
    draft = _LeaseFile(place.root, f".new-{host.host_id}-{place.name}".replace(LOCKSPACE, "0"))
    await _ask("draft", draft, Done)
    try:
        target = what.format(sanlock.escaped(_path(draft)))
        await sanlock.ask("write a new lease", "direct", "init", kind, target, *options, timeout_seconds=60.0)
        await _ask("publish", _LeaseFile(place.root, place.name, draft.name), Done)
    finally:
        await _ask("discard", draft, Done)


async def sweep(config: AgentConfig, root: str, domain_id: str) -> None:
    """Removes what leases left of a domain that is gone. Raises Refused while a host is in its lockspace: one that still
    renews its number there would be reset, or end what it runs, if the file went away."""
    place = _LeaseFile(root, LOCKSPACE, domain_id=domain_id, installation=config.installation)
    if (await _ask("look", place, _Found)).exists and (numbers := await sanlock.members(_path(place))):
        raise conflict(
            f"{_path(place)} stays: {len(numbers)} hosts (number {', '.join(map(str, numbers[:5]))}) have not left this "
            "lockspace of a storage domain that is gone; start them, so that they do, or remove it by hand if they are gone",
            numbers=numbers[:50],
        )
    await _ask("sweep", place, Done)


def locate(config: AgentConfig, domain_id: str, path: str, name: str) -> _LeaseFile:
    """The file that an order names. Raises Refused(invalid) for any but a lease of a connected directory domain."""
    for domain in connected(config):
        if domain.domain_id != domain_id or not isinstance(domain.location, DirectoryLocation):
            continue
        for top in (domain.root, os.path.join(os.path.normpath(domain.location.path), domain_id)):
            if path == os.path.join(top, LEASES, name) and LEASE_NAME.fullmatch(name):
                return _LeaseFile(domain.root, name)
    raise invalid(
        f"{path!r} can't be a lease of storage domain {domain_id} on this host: connect the domain first; leases are"
        f" files {{domain}}/{LEASES}/{{id}} of directory domains",
        path=path,
    )


def _of_key(config: AgentConfig, domain_id: str, key: str, path: str) -> _LeaseFile:
    if not is_id(key):
        raise invalid(f"{key!r} can't be what a lease is for: give the id of a VM or a disk")
    return locate(config, domain_id, path, key)


def _path(place: _LeaseFile) -> str:
    return os.path.join(place.root, LEASES, place.name)


async def _ask(verb: str, request: _LeaseFile, answer: type[children.T]) -> children.T:
    try:
        return await children.python(
            "host_agent.lease_files", verb, request, answer, timeout_seconds=FILE_SECONDS
        )
    except ChildFailed as failure:
        raise Refused(Kind.UNAVAILABLE, f"the leases' storage doesn't answer: {failure.reason}") from failure


# Looking


async def report(host: Host, order: ReportLeases, running: Running) -> LeasesReport:
    ability = await describe(host.config)
    if not ability.version:
        return LeasesReport(ability=ability)
    status = await sanlock.status()
    return LeasesReport(ability=ability, lockspaces=status.lockspaces, held=status.held)


async def describe(config: AgentConfig) -> LeaseAbility:
    """What this host could hold, and what is missing; never raises Refused."""
    try:
        status = await sanlock.status()
    except Refused as refused:
        return LeaseAbility(
            problem=refused.message, watchdog=Watchdog(problem="sanlock doesn't run on this host")
        )
    problem = libvirt_problem()
    return LeaseAbility(
        version=status.version,
        domains=not problem,
        problem=problem,
        watchdog=await watchdog.look(config.watchdog_class_path, status.uses_watchdog),
    )


def libvirt_problem(conf: Path = QEMU_CONF, plugins: tuple[str, ...] = PLUGINS) -> str:
    """Why libvirt doesn't make domains hold their leases; "" when it does. As configured: it is read at its start."""
    if not any(Path(place, "lock-driver", "sanlock.so").exists() for place in plugins):
        return (
            "libvirt has no sanlock plugin: install libvirt-sanlock (Debian) or libvirt-daemon-plugin-sanlock"
            " (Enterprise Linux), then restart libvirtd"
        )
    try:
        found = _LOCK_MANAGER.findall(conf.read_text())
    except OSError as error:
        return f"{conf} can't be read: {error.strerror}"
    if not found or found[-1] != "sanlock":
        return f'libvirt doesn\'t use sanlock: set lock_manager = "sanlock" in {conf} and restart libvirtd'
    return ""


async def check_lease(lease: DomainLease | None) -> None:
    """Raises Refused for a domain whose lease could not be held here, or that libvirt would not even look at."""
    if lease is None:
        return
    problem = libvirt_problem()
    if not problem and await joined(lease.lockspace) is None:
        problem = (
            f"it has not joined the lockspace of storage domain {lease.lockspace}: connect the domain here"
        )
    if problem:
        raise Refused(Kind.UNAVAILABLE, f"this host can't hold the VM's lease: {problem}", key=lease.key)


async def check_held(lease: DomainLease) -> None:
    """Raises Refused unless a process of this host holds it: libvirtd may run with an older configuration."""
    held = (await sanlock.status()).held
    if not any((one.lockspace, one.key) == (lease.lockspace, lease.key) for one in held):
        raise Refused(
            Kind.UNAVAILABLE,
            f"VM {lease.key} started without its lease: restart libvirtd on this host, which has not read that its"
            " lock manager is sanlock",
            key=lease.key,
        )


async def read_host(host: Host, order: ReadHostLease, running: Running) -> HostLeaseReadings:
    """Raises Refused when either reading fails: a lease that can't be read is no lease that has expired."""
    place = locate(host.config, order.domain_id, order.path, LOCKSPACE)
    if not 1 <= order.host_number <= MAX_HOST_NUMBER:
        raise invalid(
            f"{order.host_number} can't be a host's number in a lockspace: give 1 to {MAX_HOST_NUMBER}"
        )
    if not 0 <= order.wait_seconds <= MAX_WAIT_SECONDS:
        raise invalid(
            f"{order.wait_seconds:g} s between two readings can't be waited: give 0 to {MAX_WAIT_SECONDS:g}"
        )
    first = await _reading(order, _path(place))
    await asyncio.sleep(order.wait_seconds)
    second = await _reading(order, _path(place))
    boot_id = await asyncio.to_thread(Path(host.config.boot_id_path).read_text)
    return HostLeaseReadings(reader_boot_id=boot_id.strip(), first=first, second=second)


async def _reading(order: ReadHostLease, path: str) -> HostLeaseReading:
    asked = monotonic()
    leader: Leader = await sanlock.read_host(order.domain_id, order.host_number, path)
    return HostLeaseReading(
        asked_seconds=asked,
        answered_seconds=monotonic(),
        holder=leader.text("resource_name"),
        generation=leader.number("owner_generation"),
        timestamp=leader.number("timestamp"),
        io_timeout_seconds=leader.number("io_timeout"),
    )


async def free_host(host: Host, order: FreeHostLease, running: Running) -> Done:
    """One that is free already is a success. Whose boot it is has been proven dead by whoever ordered it; that it is that
    boot's is looked at here, just before it is written. Raises Refused(timeout) while it may still be written."""
    place = locate(host.config, order.domain_id, order.path, LOCKSPACE)
    own = await joined(order.domain_id)
    if own is None or own.host_number == order.host_number or not 1 <= order.host_number <= MAX_HOST_NUMBER:
        raise invalid(
            f"this host can't free the lease of number {order.host_number} in the lockspace of storage domain"
            f" {order.domain_id}: it has to be in that lockspace itself, under another number"
        )
    what = sanlock.lockspace(order.domain_id, order.host_number, _path(place))
    doing = f"free the lease of number {order.host_number}"
    async with _alone(host.config, order) as descriptor:
        if await _is_taken(order, place):
            await sanlock.ask(doing, "direct", "release_id", "-s", what, pass_fds=(descriptor,))
            if await _is_taken(order, place):
                raise Refused(
                    Kind.UNAVAILABLE, f"{order.path} was written and hasn't changed: look at the storage"
                )
    return Done()


@contextlib.asynccontextmanager
async def _alone(config: AgentConfig, order: FreeHostLease) -> AsyncIterator[int]:
    """A child that a former order left behind, stuck in the kernel, may write yet."""
    lock = Path(config.state_dir) / "locks" / f"lease-{order.domain_id}-{order.host_number}"
    otherwise = (
        f"an earlier attempt to free {order.path} has not ended: look at the storage's mount on this host"
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            held = children.held(lock, wait_seconds=FORMER_SECONDS, otherwise=otherwise)
            descriptor = await stack.enter_async_context(held)
        except Refused as refused:
            raise Refused(Kind.TIMEOUT, refused.message) from refused
        yield descriptor


async def _is_taken(order: FreeHostLease, place: _LeaseFile) -> bool:
    """Whether the boot that the order means holds it. Raises Refused(conflict) when it is another's."""
    try:
        leader = await sanlock.read_host(order.domain_id, order.host_number, _path(place))
    except Refused as refused:  # a reading without an answer leaves nothing open
        raise Refused(Kind.UNAVAILABLE, refused.message) from refused
    if leader.number("owner_generation") != order.generation:
        raise Refused(
            Kind.CONFLICT,
            f"number {order.host_number} in the lockspace of storage domain {order.domain_id} was taken"
            f" {leader.number('owner_generation')} times, not {order.generation}: it is another boot's",
            rule=LEASE_TAKEN,
        )
    return leader.number("timestamp") != 0


ACTIONS: tuple[Action[Any, Any], ...] = (
    Action(JOIN_LOCKSPACE, join),
    Action(LEAVE_LOCKSPACE, whole(leave)),
    Action(CREATE_LEASE, create),
    Action(DELETE_LEASE, whole(delete)),
    Action(REPORT_LEASES, report),
    Action(READ_HOST_LEASE, read_host),
    Action(FREE_HOST_LEASE, whole(free_host)),
)
