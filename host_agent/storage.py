"""Which storage domains this host has connected, and what is on them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from host_agent import chains, children, iscsi, leases, places
from host_agent.action import Action, Host, Running
from host_agent.leased import Hold
from host_agent.places import ConnectedDomain
from volery.contracts.agent import StorageDomainReport, VolumeReport
from volery.contracts.base import Done
from volery.contracts.errors import Refused, invalid
from volery.contracts.ids import is_id
from volery.contracts.volume_orders import (
    CONNECT_STORAGE,
    DISCONNECT_STORAGE,
    DISCOVER_ISCSI,
    ConnectStorage,
    DirectoryLocation,
    DisconnectStorage,
    DiscoverIscsi,
    IscsiTargets,
)

LOOK_SECONDS = 20.0
"""For listing one domain; beyond it the domain is unreachable from this host."""


class _Domain(msgspec.Struct):
    """Request to `host_agent.files`: connect or report."""

    domain_id: str
    installation: str
    path: str = ""
    root: str = ""
    initialise: bool = False


class Contents(msgspec.Struct):
    """Answer of `host_agent.files`: connect or report."""

    root: str
    capacity_bytes: int
    available_bytes: int
    volumes: tuple[VolumeReport, ...]
    strangers: tuple[str, ...]


async def connect(host: Host, order: ConnectStorage, running: Running) -> StorageDomainReport:
    """Checks (or initialises) the domain, remembers it, and says what is there.

    Strangers are what no entry of `known` explains; volumes with a volume's name are listed either way.
    Raises Refused: no such directory, not writable, another installation's marker, target or CHAP refused.
    """
    if not is_id(order.domain_id):
        raise invalid(f"{order.domain_id!r} isn't the id of a storage domain")
    root = ""
    if isinstance(order.location, DirectoryLocation):
        report, root = await _connect_directory(host, order, order.location)
    else:
        report = await iscsi.report(order.domain_id, order.location)
    places.remember(
        host.config, ConnectedDomain(domain_id=order.domain_id, location=order.location, root=root)
    )
    unknown = {v.path for v in report.volumes} - set(order.known)
    strangers = sorted(unknown | set(report.strangers))
    report = msgspec.structs.replace(report, strangers=tuple(strangers))
    return (await chains.with_open(host, [report]))[0]


async def _connect_directory(
    host: Host, order: ConnectStorage, location: DirectoryLocation
) -> tuple[StorageDomainReport, str]:
    path = location.path
    if not os.path.isabs(path) or ".." in path.split("/") or not path.isprintable():
        raise invalid(f"{path!r} can't be a storage domain's directory: give an absolute path without `..`")
    request = _Domain(
        domain_id=order.domain_id,
        installation=host.config.installation,
        path=os.path.normpath(path),
        initialise=order.initialise,
    )
    found = await places.ask("connect", request, Contents, timeout_seconds=LOOK_SECONDS)
    return _report(order.domain_id, found), found.root


def _report(domain_id: str, found: Contents) -> StorageDomainReport:
    return StorageDomainReport(
        domain_id=domain_id,
        reachable=True,
        capacity_bytes=found.capacity_bytes,
        available_bytes=found.available_bytes,
        volumes=found.volumes,
        strangers=found.strangers,
    )


async def disconnect(host: Host, order: DisconnectStorage, running: Running) -> Done:
    """Forgets the domain; with `remove` also its own directory, if nothing but Volery's empty folders and leases that
    nobody can hold any more is in it."""
    if order.remove:
        await _remove(host, order)
    places.forget(host.config, order.domain_id)
    return Done()


async def _remove(host: Host, order: DisconnectStorage) -> None:
    if not is_id(order.domain_id):
        raise invalid(f"{order.domain_id!r} isn't the id of a storage domain")
    roots = [d.root for d in places.connected(host.config) if d.domain_id == order.domain_id and d.root]
    if order.path and os.path.isabs(order.path) and ".." not in order.path.split("/"):
        roots.append(os.path.join(os.path.normpath(order.path), order.domain_id))
    for root in dict.fromkeys(roots):
        request = _Domain(domain_id=order.domain_id, installation=host.config.installation, root=root)
        await leases.sweep(host.config, root, order.domain_id)
        await places.ask("abandon", request, Done, timeout_seconds=LOOK_SECONDS)


async def discover(host: Host, order: DiscoverIscsi, running: Running) -> IscsiTargets:
    return await iscsi.discover(order.portal, order.chap_user, order.chap_password)


async def report(host: Host) -> tuple[StorageDomainReport, ...]:
    """Every connected domain as it is now; one that hangs delays nobody else and is said to be unreachable.

    Here strangers are only what can't be a volume: the owner tells unknown volumes from `volumes`.
    """
    domains = places.connected(host.config)
    lockspaces = await leases.lockspaces() if domains else {}
    reports = await asyncio.gather(*(_report_domain(host, domain) for domain in domains))
    said = [msgspec.structs.replace(one, lockspace=lockspaces.get(one.domain_id)) for one in reports]
    return await chains.with_open(host, said)


async def _report_domain(host: Host, domain: ConnectedDomain) -> StorageDomainReport:
    try:
        if not isinstance(domain.location, DirectoryLocation):
            return await iscsi.report(domain.domain_id, domain.location)
        # A look that can't be killed keeps this lock: hung looks don't pile up.
        async with children.held(
            Path(host.config.state_dir) / "locks" / f"look-{domain.domain_id}",
            wait_seconds=1.0,
            otherwise=f"{domain.location.path} hangs: a former look at it has not come back",
        ) as lock:
            request = _Domain(
                domain_id=domain.domain_id, installation=host.config.installation, root=domain.root
            )
            found = await places.ask(
                "report", request, Contents, timeout_seconds=LOOK_SECONDS, hold=Hold(lock)
            )
            return _report(domain.domain_id, found)
    except Refused as refused:
        return StorageDomainReport(domain_id=domain.domain_id, reachable=False, problem=refused.message)


ACTIONS = (
    Action(CONNECT_STORAGE, connect),
    Action(DISCONNECT_STORAGE, disconnect),
    Action(DISCOVER_ISCSI, discover),
)
