"""A host that is without a required network for a while, though others have it, has lost it, and gets it back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from services.network import model
from services.network.store import HostRow, HostState
from tests.network.scripted_network import NetworkHost, Plant, plant, refusing
from tests.support import losses
from volery.contracts.base import Owner
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.network import UPDATE_NETWORK, Network, UpdateNetwork
from volery.contracts.network_orders import NetworkKind
from volery.runtime.programs import Settings


@pytest.fixture
def hurried(configured: Settings) -> Settings:
    return losses.hurried(configured, Owner.NETWORK, again_seconds=0)


async def plug(host: NetworkHost, network: Network, *, connected: bool) -> None:
    """Its cable, which its agent notices."""
    if connected:
        host.unplugged.discard(network.id)
    else:
        host.unplugged.add(network.id)
    await host.agent.report("network")


async def shows(at: Plant, network: Network, holds: Callable[[Network], object]) -> Network:
    async def shown() -> Network | None:
        now = await at.get(network)
        return now if holds(now) else None

    found: Network = await at.until(shown)
    return found


async def test_a_host_whose_cable_is_pulled_loses_a_required_network(hurried: Settings) -> None:
    async with plant(hurried) as at:
        network, other = await at.network("needed", required=True), await at.network("other")
        for one in (network, other):
            await at.until_ready(one, 2)
        host = at.hosts[0]
        await plug(host, network, connected=False)
        now = await shows(at, network, lambda now: now.problems)
        assert now.problems == {host.agent.host_id: "eth1 has no link"}
        assert now.ready_host_ids == (at.hosts[1].agent.host_id,)
        await plug(host, other, connected=False)
        now = await shows(at, network, lambda now: now.lost)
        assert now.lost == {host.agent.host_id: "eth1 has no link"}
        applies = host.applies()
        await plug(host, network, connected=True)
        now = await shows(at, network, lambda now: len(now.ready_host_ids) == 2)
        assert now.lost, "it must have it for a while first"
        assert (await at.get(other)).problems, "the other cable is still out"
        await shows(at, network, lambda now: not now.lost)
        assert (await at.get(other)).lost == {}, "it isn't required"
        assert host.applies() == applies, "a cable isn't mended by an order"


async def test_one_that_no_host_has_is_lost_by_nobody(hurried: Settings) -> None:
    async with plant(hurried) as at:
        network, proof = await at.network("needed", required=True), await at.network("proof", required=True)
        for one in (network, proof):
            await at.until_ready(one, 2)
        for host in at.hosts:
            await plug(host, network, connected=False)
        await shows(at, network, lambda now: len(now.problems) == 2)
        await plug(at.hosts[0], proof, connected=False)
        await shows(at, proof, lambda now: now.lost)  # by now it would have been decided
        assert (await at.get(network)).lost == {}


async def test_a_network_that_a_host_cannot_make_is_lost_until_it_is_not_required(hurried: Settings) -> None:
    async with plant(hurried) as at:
        at.hosts[0].refuse = refusing(Refused(Kind.CONFLICT, "there is a device of that name"), "needed")
        network = await at.network("needed", required=True)
        now = await shows(at, network, lambda now: now.lost)
        assert now.lost == {at.hosts[0].agent.host_id: "there is a device of that name"}
        await at.bus.ask(UPDATE_NETWORK, UpdateNetwork(id=network.id, required=False))
        await shows(at, network, lambda now: not now.lost)


async def test_a_bridge_that_is_gone_is_lost_with_the_hosts_own_words(hurried: Settings) -> None:
    async with plant(hurried) as at:
        network = await at.network("needed", required=True)
        await at.until_ready(network, 2)
        host = at.hosts[0]
        host.refuse = refusing(Refused(Kind.CONFLICT, "there is a device of that name"), "needed")
        host.broken.add(network.id)
        await host.agent.report("network")
        now = await shows(at, network, lambda now: now.lost)
        assert now.lost == {host.agent.host_id: "there is a device of that name"}
        host.refuse = None
        await host.agent.report("network")
        await shows(at, network, lambda now: not now.lost)
        assert (await at.get(network)).problems == {}


NOW = datetime(2026, 11, 29, tzinfo=UTC)
NETWORK = Network(
    id="n",
    revision=1,
    created_at=NOW,
    updated_at=NOW,
    name="net",
    data_center_id="d",
    kind=NetworkKind.BRIDGE,
    cluster_ids=("c",),
    required=True,
)


def host(name: str, status: HostStatus = HostStatus.UP, cluster_id: str = "c") -> HostRow:
    return HostRow(name, name, "d", cluster_id, str(status), "", (), "")


@pytest.mark.parametrize(
    ("row", "state", "has", "lacks"),
    [
        (host("h"), HostState(ready=("n",)), True, ""),
        (host("h"), HostState(), False, "it isn't there, and the host doesn't say why"),
        (host("h"), HostState(problems={"n": "a clash"}), False, "a clash"),
        (host("h"), HostState(ready=("n",), problems={"n": "its MTU is too large"}), True, ""),
        (host("h"), HostState(ready=("n",), severed={"n": "no link"}), False, "no link"),
        (host("h"), HostState(ready=("n",), severed={"m": "no link"}), True, ""),
        (host("h"), None, False, ""),
        (host("h", cluster_id="other"), HostState(), False, ""),
        (host("h", HostStatus.NON_OPERATIONAL), HostState(ready=("n",)), True, ""),
        (host("h", HostStatus.CONNECTING), HostState(ready=("n",)), True, ""),
        (host("h", HostStatus.MAINTENANCE), HostState(), False, ""),
        (host("h", HostStatus.NON_RESPONSIVE), HostState(ready=("n",)), False, ""),
    ],
)
def test_who_has_it_and_who_lacks_it(row: HostRow, state: HostState | None, has: bool, lacks: str) -> None:
    states = {} if state is None else {"h": state}
    assert model.standing(NETWORK, [row], states) == (
        frozenset({"h"} if has else ()),
        {"h": lacks} if lacks else {},
    )
