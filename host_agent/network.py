"""The host's networks made to be what the control plane wants, all or none, and never at the price of losing it.

A change is written down before it begins, checked by a round trip to the control plane, and undone when that
fails or when the agent died in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from host_agent import children, netlink, network_plan
from host_agent.action import Action, Host, Running
from host_agent.config import AgentConfig
from host_agent.netlink import NatDown, NatUp, Step, opposite
from host_agent.network_plan import Seen
from host_agent.places import write_state
from volery.contracts.agent import BridgeReport
from volery.contracts.errors import Kind, Refused
from volery.contracts.network_orders import (
    APPLY_NETWORKS,
    ApplyNetworks,
    HostNetwork,
    NetworkKind,
    NetworksApplied,
)

log = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 0.25
LOCK_WAIT_SECONDS = 30.0
FEATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vlan", ("link", "add", "link", "lo", "name", "probe", "type", "vlan", "id", "2")),
    ("vxlan", ("link", "add", "probe", "type", "vxlan", "id", "2", "dstport", "4789")),
    ("bridge_vlan_filtering", ("link", "add", "probe", "type", "bridge", "vlan_filtering", "1")),
)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The file `networks.json` in the agent's state directory."""

    desired: tuple[HostNetwork, ...] = ()
    """Confirmed: made again after a reboot, with or without a control plane."""
    pending: tuple[Step, ...] = ()
    """A change that was begun and not confirmed: undone when the agent starts again."""
    pending_boot_id: str = ""
    """The run of the machine that began it: after a reboot the kernel has forgotten it by itself."""


def _file(config: AgentConfig) -> Path:
    return Path(config.state_dir) / "networks.json"


def _load(config: AgentConfig) -> State:
    try:
        return msgspec.json.decode(_file(config).read_bytes(), type=State)
    except FileNotFoundError:
        return State()


def _boot_id(config: AgentConfig) -> str:
    return Path(config.boot_id_path).read_text().strip()


@contextlib.asynccontextmanager
async def _alone(config: AgentConfig) -> AsyncIterator[None]:
    async with children.held(
        Path(config.state_dir) / "locks" / "networks",
        wait_seconds=LOCK_WAIT_SECONDS,
        otherwise="another change of this host's networks is under way: try again when it has ended",
    ):
        yield


async def _see(host: Host, *, with_nat: bool = True) -> Seen:
    kernel = await asyncio.to_thread(netlink.read)
    networks = await host.hypervisor.networks() if with_nat else []
    return Seen(kernel, {n.name: n.xml for n in networks if n.active}, host.config.installation)


async def apply(host: Host, order: ApplyNetworks, running: Running) -> NetworksApplied:
    """Makes the host's networks exactly these. Raises Refused; then everything is as it was before."""
    async with _alone(host.config):
        await _undo_unconfirmed(host)
        state = _load(host.config)
        nat = _needs_nat(order.networks) or _needs_nat(state.desired)
        steps = network_plan.plan(await _see(host, with_nat=nat), order.networks)
        if steps:
            await _change(host, state, steps, order.check_seconds)
        write_state(_file(host.config), State(desired=order.networks))
        return NetworksApplied(networks=await _reports(host, order.networks))


def _needs_nat(networks: Sequence[HostNetwork]) -> bool:
    """Whether libvirt has to be asked: a host without NAT networks doesn't depend on it here."""
    return any(network.kind is NetworkKind.NAT for network in networks)


async def _change(host: Host, state: State, steps: list[Step], check_seconds: float) -> None:
    """Does the steps and checks; on any failure, also on a cancel, undoes them."""
    config = host.config
    pending = State(desired=state.desired, pending=tuple(steps), pending_boot_id=_boot_id(config))
    write_state(_file(config), pending)
    try:
        for step in steps:
            await _perform(host, step)
        await _check(host, check_seconds)
    except BaseException as error:
        # shielded: whoever cancels us mustn't leave a host that nobody can reach
        await asyncio.shield(asyncio.ensure_future(_undo_unconfirmed(host)))
        if isinstance(error, TimeoutError):
            raise Refused(
                Kind.UNAVAILABLE,
                f"with these networks the host lost the control plane for {check_seconds:g} s, so everything was put "
                "back as it was: check which device leads to the control plane, and its VLAN",
                rolled_back=True,
            ) from error
        raise


async def _perform(host: Host, step: Step) -> None:
    if isinstance(step, NatUp):
        await host.hypervisor.create_network(step.xml)
    elif isinstance(step, NatDown):
        await host.hypervisor.destroy_network(step.name)
    else:
        await asyncio.to_thread(netlink.perform, step)


async def _check(host: Host, check_seconds: float) -> None:
    """Returns once the control plane answered. Raises TimeoutError."""
    async with asyncio.timeout(check_seconds):
        while True:
            if await host.control_plane_reachable():
                return
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)


async def _undo_unconfirmed(host: Host) -> None:
    """Puts back what an unconfirmed change of this run of the machine touched."""
    state = _load(host.config)
    if state.pending and state.pending_boot_id == _boot_id(host.config):
        for step in reversed(state.pending):
            try:
                undo = opposite(step)
                if isinstance(undo, NatUp) and undo.name in (await _see(host)).nats:
                    continue
                await _perform(host, undo)
            except Refused as refused:  # the rest must still go back
                log.error("undoing a change of the host's networks: %s", refused.message)
    if state.pending:
        write_state(_file(host.config), State(desired=state.desired))


async def restore(host: Host) -> None:
    """At the agent's start: undo a change that was never confirmed, and make the confirmed networks again.

    Needs no control plane. What can't be made is said in `report` and does not stop the agent.
    """
    async with _alone(host.config):
        await _undo_unconfirmed(host)
        desired = _load(host.config).desired
        for network in desired:
            try:
                seen = await _see(host, with_nat=network.kind is NetworkKind.NAT)
                for step in network_plan.changes(seen, network):
                    await _perform(host, step)
            except Refused as refused:
                log.error("network %s is not as it should be: %s", network.name, refused.message)


async def report(host: Host) -> tuple[BridgeReport, ...]:
    """Each confirmed network, and whether the kernel has it as it must be."""
    return await _reports(host, _load(host.config).desired)


async def _reports(host: Host, networks: Sequence[HostNetwork]) -> tuple[BridgeReport, ...]:
    seen = await _see(host, with_nat=False)
    nats: Seen | Refused = seen
    if _needs_nat(networks):
        try:
            nats = await _see(host)
        except Refused as refused:
            nats = refused
    return tuple(_report(nats if network.kind is NetworkKind.NAT else seen, network) for network in networks)


def _report(seen: Seen | Refused, network: HostNetwork) -> BridgeReport:
    def say(in_sync: bool, problem: str, link_down: str = "") -> BridgeReport:
        return BridgeReport(
            network_id=network.network_id,
            bridge=network.bridge,
            in_sync=in_sync,
            problem=problem,
            link_down=link_down,
        )

    if isinstance(seen, Refused):
        return say(False, seen.message)
    try:
        steps = network_plan.changes(seen, network)
    except Refused as refused:
        return say(False, refused.message)
    if steps:
        return say(False, "the host's devices were changed by somebody else: apply the host's networks again")
    down = network_plan.link_down(seen.kernel, network)
    return say(True, network_plan.advice(seen.kernel, network), down)


async def nics() -> tuple[str, ...]:
    """Devices of the host that could carry a logical network."""
    return network_plan.nics(await asyncio.to_thread(netlink.read))


async def features() -> tuple[str, ...]:
    """Which kinds of network device the kernel has, tried in a network namespace that ends with the trial."""
    found = []
    for feature, arguments in FEATURES:
        try:
            await children.run(["unshare", "-n", "ip", *arguments], timeout_seconds=5)
        except children.ChildFailed:
            continue
        found.append(feature)
    return tuple(found)


ACTIONS = (Action(APPLY_NETWORKS, apply),)
