"""Each host's whole set of networks: computed, ordered, confirmed; and what waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from msgspec.structs import replace

from services.network import model
from services.network.fabric import Fabric
from services.network.store import ATTACHMENTS, NETWORKS, HostRow, HostState
from volery.contracts.agent import NETWORKS_REPORTED, BridgeReport, NetworksReported
from volery.contracts.errors import Kind, Refused, not_found, unavailable
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id
from volery.contracts.network import (
    PREPARE_NETWORKS,
    SETUP_HOST_NETWORKS,
    Attachment,
    Network,
    NetworkBridge,
    PreparedNetworks,
    PrepareNetworks,
    SetupHostNetworks,
)
from volery.contracts.network_orders import (
    APPLY_NETWORKS,
    ApplyNetworks,
    HostNetwork,
    NetworkKind,
    NetworksApplied,
)
from volery.contracts.operation import Operation
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale

log = logging.getLogger(__name__)

part = Part()
PAUSE_EVERY = 100
"""Hosts that are compared in one go."""
UNHEARD_SECONDS = 15.0
"""How often a host is asked that has not said anything yet: it begins with a report, which may wait for its turn."""
LOOK_SECONDS = 1.0
"""How often a waiting start looks, should it have missed the event."""
ONE_BY_ONE = 16
"""Changes that are tried singly when the whole set was refused; with more, the whole waits."""
THE_SET_S_FAULT = frozenset({Kind.INVALID, Kind.CONFLICT, Kind.NOT_FOUND})
"""Refusals after which a smaller set may succeed."""


async def desired(svc: Fabric, host: HostRow, attachments: Sequence[Attachment]) -> model.Desired:
    networks = [row.public for row in await svc.store.networks_in(host.data_center_id)]
    around = await svc.neighbours(host) if any(n.kind is NetworkKind.VXLAN for n in networks) else ()
    return model.desired(host, networks, attachments, around)


async def unsettled(svc: Fabric) -> list[str]:
    """Hosts whose networks aren't what they should be: all are compared in one look at the tables."""
    states, found = await svc.store.states(), list[str]()
    networks, attachments = await svc.store.networks(), await svc.store.attachments()
    hosts = await svc.store.hosts()
    around: dict[str, list[HostRow]] = {}
    for host in hosts:
        around.setdefault(host.data_center_id, []).append(host)
    for number, host in enumerate(hosts):
        if number % PAUSE_EVERY == 0:
            await asyncio.sleep(0)  # others have their turn meanwhile
        if host.status not in model.CAN_APPLY:
            continue
        here = networks.get(host.data_center_id, ())
        wanted = model.desired(host, here, attachments.get(host.id, ()), around[host.data_center_id])
        state = states.get(host.id)
        if state is None or _due(svc, host.id, state, wanted, again=False):
            found.append(host.id)
    return found


async def reconcile_host(svc: Fabric, host_id: str, *, again: bool = False) -> None:
    """Order the host's set when it differs from what was tried last, or the host says that it isn't so any more."""
    async with svc.lock(host_id):
        host = await svc.store.host(host_id)
        if host is None or host.status not in model.CAN_APPLY or svc.core.quarantine.holds:
            return
        rows = await svc.store.attachments_of(host_id)
        wanted = await desired(svc, host, [row.public for row in rows])
        state = await svc.store.state(host_id)
        if state is not None and not _due(svc, host_id, state, wanted, again):
            return
        new = await settle(svc, host_id, wanted, state or HostState())
        svc.tried[host_id] = monotonic()
        await _write(svc, host_id, new, rows)


def _due(svc: Fabric, host_id: str, state: HostState, wanted: model.Desired, again: bool) -> bool:
    if again or state.tried != wanted.digest:
        return True
    if not state.dirty and not state.failed:
        return any(state.problems.get(i) != why for i, why in wanted.problems.items())
    return monotonic() - svc.tried.get(host_id, -1e9) >= svc.config.again_seconds


async def settle(svc: Fabric, host_id: str, wanted: model.Desired, state: HostState) -> HostState:
    """Apply the set; if the host refuses it as a whole, as much of it as it takes."""
    problems = dict(wanted.problems)
    try:
        report = await apply(svc, host_id, wanted.networks)
        return _applied(wanted, wanted.networks, report, problems)
    except Refused as refused:
        changed, going = model.changed_networks(state.applied, wanted.networks)
        log.info("networks of host %s: %s", host_id, refused.message)
        count = len(changed) + len(going)
        if refused.kind not in THE_SET_S_FAULT or count <= 1 or count > ONE_BY_ONE:
            gone = [network for network in wanted.networks if network.network_id not in state.ready]
            problems |= {network.network_id: refused.message for network in (*changed, *going, *gone)}
            return replace(state, tried=wanted.digest, problems=problems, failed=True)
    return await _one_by_one(svc, host_id, wanted, state, problems)


async def _one_by_one(
    svc: Fabric, host_id: str, wanted: model.Desired, state: HostState, problems: dict[str, str]
) -> HostState:
    """One network that can't be must not keep the others away."""
    good: tuple[HostNetwork, ...] = state.applied
    report: NetworksApplied | None = None
    changed, going = model.changed_networks(state.applied, wanted.networks)
    for network_id, candidate in [
        *((n.network_id, partial(model.without, network_id=n.network_id)) for n in going),
        *((n.network_id, partial(model.with_network, network=n)) for n in changed),
    ]:
        try:
            report = await apply(svc, host_id, candidate(good))
            good = candidate(good)
        except Refused as refused:
            problems[network_id] = refused.message
    if report is None:
        return replace(state, tried=wanted.digest, problems=problems, failed=True)
    return replace(_applied(wanted, good, report, problems), failed=True)


def _applied(
    wanted: model.Desired,
    networks: tuple[HostNetwork, ...],
    report: NetworksApplied,
    problems: dict[str, str],
) -> HostState:
    said = {bridge.network_id: bridge for bridge in report.networks}
    for network_id, bridge in said.items():
        if bridge.problem:
            problems.setdefault(network_id, bridge.problem)
    ready = tuple(sorted(i for i, bridge in said.items() if bridge.in_sync))
    return HostState(
        tried=wanted.digest,
        applied=networks,
        ready=ready,
        problems=problems,
        severed=_severed(report.networks),
        failed=len(ready) < len(networks),
    )


def _severed(bridges: Iterable[BridgeReport]) -> dict[str, str]:
    return {bridge.network_id: bridge.link_down for bridge in bridges if bridge.link_down}


async def apply(
    svc: Fabric, host_id: str, networks: Sequence[HostNetwork], check_seconds: float = 0.0
) -> NetworksApplied:
    """Raises Refused with the host's sentence; then the host is as it was."""
    check = check_seconds or svc.config.check_seconds
    return await svc.core.orders.carry_out(
        APPLY_NETWORKS,
        ApplyNetworks(host_id=host_id, networks=tuple(networks), check_seconds=check),
        host_id=host_id,
        object_id=host_id,
        timeout_seconds=svc.config.apply_seconds + check,
    )


async def _write(
    svc: Fabric, host_id: str, state: HostState, rows: Sequence[Row[Attachment, Nothing]]
) -> None:
    """Remember the host's state, show it in its attachments, and have the networks' documents follow."""
    before = await svc.store.state(host_id) or HostState()
    changes = [svc.store.remember(host_id, state)]
    for row in rows:
        network_id = row.public.network_id
        in_sync, problem = network_id in state.ready, state.problems.get(network_id, "")
        new = replace(row.public, in_sync=in_sync, problem=problem)
        if new != row.public:
            changes.append(ATTACHMENTS.update(row, new))
    try:
        await svc.core.commit(*changes)
    except Stale:  # an attachment went with its network: the state is what counts
        await svc.core.commit(svc.store.remember(host_id, state))
    touched = set(before.ready) ^ set(state.ready)
    touched |= _changed(before.problems, state.problems) | _changed(before.severed, state.severed)
    for network_id in sorted(touched):
        svc.core.wake(f"network:{network_id}")
    svc.say_settled()


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    return {i for i in before.keys() | now.keys() if before.get(i) != now.get(i)}


async def show(svc: Fabric, network_id: str) -> None:
    """Where a network is ready and where it isn't, in its document. One writer per network, so hosts never race."""
    row = await NETWORKS.find(svc.core.pool, network_id)
    if row is None:
        return
    hosts = {host.id: host for host in await svc.store.hosts_in(row.public.data_center_id)}
    states = await svc.store.states()
    live = {i: states[i] for i, h in hosts.items() if i in states and h.status in model.CAN_APPLY}
    ready = tuple(
        sorted(
            i for i, state in live.items() if network_id in state.ready and network_id not in state.severed
        )
    )
    said = {i: state.problems | state.severed for i, state in sorted(live.items())}
    problems = {i: why[network_id] for i, why in said.items() if network_id in why}

    def shown(row: Row[Network, Nothing]) -> tuple[Network, Nothing]:
        return replace(row.public, ready_host_ids=ready, problems=problems), row.private

    await svc.edit(NETWORKS, network_id, shown)


@part.hears_hosts_together(NETWORKS_REPORTED)
async def reported(svc: Fabric, said: Sequence[NetworksReported]) -> list[Change]:
    """Hosts' own reports. One may be older than its host's last order, so a difference is applied again, not believed."""
    states = await svc.store.states_of([fact.host_id for fact in said])
    return [change for fact in said for change in _reported(svc, fact, states.get(fact.host_id))]


def _reported(svc: Fabric, fact: NetworksReported, state: HostState | None) -> list[Change]:
    if state is None:
        svc.core.wake(f"host:{fact.host_id}")
        return []
    said = {bridge.network_id: bridge.in_sync for bridge in fact.networks}
    has = {network.network_id for network in state.applied}
    severed = _severed(fact.networks)
    shown = [f"network:{network_id}" for network_id in sorted(_changed(state.severed, severed))]
    if said.keys() == has and all(said[i] for i in state.ready):
        if state.failed:  # what was in its way may be gone
            svc.core.wake(f"host:{fact.host_id}")
        if not shown:
            return []
        return [svc.then_wake(svc.store.remember(fact.host_id, replace(state, severed=severed)), *shown)]
    ready = tuple(i for i in state.ready if said.get(i))
    svc.tried.pop(fact.host_id, None)
    told = svc.store.remember(fact.host_id, replace(state, dirty=True, ready=ready, severed=severed))
    return [svc.then_wake(told, f"host:{fact.host_id}", *shown)]


@part.every(5.0)
async def ask_for_reports(svc: Fabric) -> None:
    """Every host says now and then how its networks are, spread over the time between."""
    now = monotonic()
    for host in await svc.store.hosts():
        heard = host.id in svc.core.hosts.positions  # no order can be given before its first report
        pause = svc.config.report_seconds if heard else min(UNHEARD_SECONDS, svc.config.report_seconds)
        due = now - svc.asked.get(host.id, float("-inf")) >= pause
        if host.status in model.CAN_APPLY and due:
            svc.asked[host.id] = now
            await svc.core.hosts.ask_report(host.id)


# Waiting for a host


@part.leader_answers(PREPARE_NETWORKS)
async def prepare(svc: Fabric, ask: PrepareNetworks, caller: Caller) -> PreparedNetworks:
    """Waits until the host has these networks. Raises Refused with the host's sentence, or when it takes too long."""
    checked_id("host", ask.host_id)
    until = monotonic() + svc.config.prepare_seconds
    while True:
        settled = svc.settled
        networks = await _networks(svc, ask)
        host, state = await _prepared_host(svc, ask, networks)
        missing = [n for n in networks if n.id not in state.ready]
        if not missing:
            return PreparedNetworks(
                bridges=tuple(NetworkBridge(network_id=n.id, bridge=n.bridge, mtu=n.mtu) for n in networks)
            )
        await _refuse_failed(svc, host, state, missing)
        if monotonic() >= until:
            raise Refused(
                Kind.TIMEOUT,
                f"host {host.name} did not make network {missing[0].name} within {svc.config.prepare_seconds:g} s: "
                "try again, or look at the network's problems",
                network_id=missing[0].id,
            )
        svc.core.wake(f"host:{host.id}")
        await _wait(settled)


async def _wait(event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            await event.wait()
    except TimeoutError:
        return


async def _networks(svc: Fabric, ask: PrepareNetworks) -> list[Network]:
    rows = await svc.store.networks_with(ask.network_ids)
    for network_id in ask.network_ids:
        if network_id not in rows:
            raise not_found("network", network_id)
    return [rows[network_id].public for network_id in dict.fromkeys(ask.network_ids)]


async def _prepared_host(
    svc: Fabric, ask: PrepareNetworks, networks: Sequence[Network]
) -> tuple[HostRow, HostState]:
    host = await svc.store.host(ask.host_id)
    if host is None:
        raise not_found("host", ask.host_id)
    for network in networks:
        if not model.belongs(network, host):
            raise unavailable(
                f"host {host.name} doesn't have network {network.name}: it belongs to another data center or other "
                "clusters",
                network_id=network.id,
            )
    return host, await svc.store.state(host.id) or HostState()


async def _refuse_failed(svc: Fabric, host: HostRow, state: HostState, missing: Sequence[Network]) -> None:
    """Raises Refused when the host was asked for just this set and could not make one of these networks."""
    if host.status not in model.CAN_APPLY:
        raise unavailable(
            f"host {host.name} is {host.status} and can't make network {missing[0].name}", host_id=host.id
        )
    failed = [network for network in missing if network.id in state.problems]
    if not failed or state.dirty:
        return
    rows = await svc.store.attachments_of(host.id)
    if (await desired(svc, host, [row.public for row in rows])).digest == state.tried:
        raise unavailable(
            f"host {host.name} doesn't have network {failed[0].name}: {state.problems[failed[0].id]}",
            network_id=failed[0].id,
            host_id=host.id,
        )


# Which NIC carries which network


@part.answers(SETUP_HOST_NETWORKS)
async def setup(svc: Fabric, ask: SetupHostNetworks, caller: Caller) -> Operation:
    host = await svc.store.host(checked_id("host", ask.host_id))
    if host is None:
        raise not_found("host", ask.host_id)
    await _check_setup(svc, host, ask)
    if host.status not in model.CAN_APPLY:
        raise unavailable(f"host {host.name} is {host.status}: its networks can be set up when it is up")
    op, begun = svc.core.operations.begin(
        "host_networks.setup",
        object_kind="host",
        object_id=host.id,
        object_name=host.name,
        question=ask,
        caller=caller,
    )
    await svc.core.commit(begun, caller=caller, answer=op)
    return op


async def _check_setup(svc: Fabric, host: HostRow, ask: SetupHostNetworks) -> model.Desired:
    """What the host would have. Raises Refused when it can't."""
    rows = await svc.store.networks_with(ask.nics)
    model.checked_nics(host, ask.nics, {i: row.public for i, row in rows.items()})
    if not 1 <= ask.check_seconds <= 300:
        raise Refused(Kind.INVALID, "check_seconds must be 1 to 300", field="check_seconds")
    kept = {row.public.network_id: row.public.nic for row in await svc.store.attachments_of(host.id)}
    would = [_attachment(host.id, network_id, nic) for network_id, nic in {**kept, **ask.nics}.items() if nic]
    wanted = await desired(svc, host, would)
    for network_id, nic in ask.nics.items():
        if nic and network_id in wanted.problems:
            raise Refused(Kind.CONFLICT, wanted.problems[network_id], network_id=network_id)
    return wanted


def _attachment(host_id: str, network_id: str, nic: str) -> Attachment:
    now = utc_now()
    return Attachment(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        host_id=host_id,
        network_id=network_id,
        nic=nic,
        in_sync=True,
    )


@part.runs("host_networks.setup", deadline_seconds=600)
async def setting_up(svc: Fabric, run: Run) -> None:
    """The agent tries the new set and puts the old one back when the control plane is out of reach."""
    ask = run.input(SetupHostNetworks)

    async def back() -> None:
        svc.core.wake(f"again:{ask.host_id}")

    run.undo("networks", back)

    async def change() -> None:
        async with svc.lock(ask.host_id):
            await _change(svc, ask)

    await run.step("apply", "Change the host's networks and check that it is still reachable", change)


async def _change(svc: Fabric, ask: SetupHostNetworks) -> None:
    host = await svc.store.host(ask.host_id)
    if host is None:
        raise not_found("host", ask.host_id)
    wanted = await _check_setup(svc, host, ask)
    report = await apply(svc, host.id, wanted.networks, ask.check_seconds)
    state = _applied(wanted, wanted.networks, report, dict(wanted.problems))
    for network_id, nic in ask.nics.items():
        await _attach(svc, host.id, network_id, nic)
    await _write(svc, host.id, state, await svc.store.attachments_of(host.id))


async def _attach(svc: Fabric, host_id: str, network_id: str, nic: str) -> None:
    while True:
        rows = await svc.store.attachments_of(host_id)
        before = next((row for row in rows if row.public.network_id == network_id), None)
        change = _attaching(before, host_id, network_id, nic)
        if change is None:
            return
        try:
            await svc.core.commit(change)
        except Stale:
            continue
        return


def _attaching(
    before: Row[Attachment, Nothing] | None, host_id: str, network_id: str, nic: str
) -> Change | None:
    if before is None:
        made = _attachment(host_id, network_id, nic)
        return ATTACHMENTS.insert(made, Nothing()) if nic else None
    if not nic:
        return ATTACHMENTS.delete(before)
    return ATTACHMENTS.update(before, replace(before.public, nic=nic)) if nic != before.public.nic else None
