"""A cluster's fencing policy: set, read and obeyed, on a real bus and database, with scripted BMCs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.ha.site import caller, site
from tests.ha.test_leases import Storage, seen
from tests.ha.world import CLUSTER, Inventory, ha, hurried, until
from tests.support.runtime import running
from volery.contracts.cluster import CLUSTER_DELETED, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    GET_FENCING_POLICY,
    LIST_FENCING_POLICIES,
    SET_FENCING_POLICY,
    FencingPolicy,
    SetFencingPolicy,
)
from volery.runtime.bus import Bus
from volery.runtime.programs import Settings

SPARES = SetFencingPolicy(id=CLUSTER.id, skip_if_connectivity_broken=True, connectivity_broken_percent=25)


async def kept(bus: Bus) -> list[FencingPolicy]:
    page = await bus.ask(LIST_FENCING_POLICIES, ListQuery())
    return [msgspec.json.decode(item, type=FencingPolicy) for item in page.items]


async def test_nothing_is_switched_off_while_too_many_hosts_are_silent_for_its_policy(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path, 4) as at:
        await at.bus.ask(SET_FENCING_POLICY, SPARES, caller("set"))
        at.hearts[0].stop()
        held = await at.says(0, "1 of the 4 hosts of its cluster are silent")
        assert "25 %" in held.fencing
        assert at.bmc(0).did(PowerAction.OFF) == 0
        await at.bus.ask(SET_FENCING_POLICY, replace(SPARES, connectivity_broken_percent=26), caller("set"))
        await at.becomes(0, "dead")
        assert at.bmc(0).did(PowerAction.OFF) == 1


async def test_a_silent_host_is_spared_while_its_lease_is_renewed(
    configured: Settings, tmp_path: Path
) -> None:
    """By its cluster's policy, and only as long as that says so."""
    storage = Storage(says_=lambda at: seen(at, timestamp=int(at)))
    async with site(configured, tmp_path, beside=[storage.service()]) as at:
        policy = SetFencingPolicy(id=CLUSTER.id, skip_while_lease_alive=True)
        await at.bus.ask(SET_FENCING_POLICY, policy, caller("set"))
        at.hearts[0].stop()
        await at.says(0, "its storage lease is renewed, so the machine and its VMs run")
        for _ in range(6):  # longer than the silence before a fence
            storage.now += 10
            await storage.read_again(1)
        held = await at.liveness(0)
        assert (held.state, held.proof, at.bmc(0).did(PowerAction.OFF)) == ("non_responsive", None, 0)
        assert "spares it" in held.fencing
        await at.bus.ask(SET_FENCING_POLICY, SetFencingPolicy(id=CLUSTER.id), caller("set"))
        await at.becomes(0, "dead")
        assert at.bmc(0).did(PowerAction.OFF) == 1


async def test_a_policy_has_its_defaults_and_its_revision_and_goes_with_its_cluster(
    configured: Settings,
) -> None:
    owner = Inventory()
    async with running(hurried(configured), owner.service(), ha()) as bus:
        default = await bus.ask(GET_FENCING_POLICY, GetById(id=CLUSTER.id))
        assert (default.revision, default.skip_if_connectivity_broken) == (0, False)
        made = await bus.ask(SET_FENCING_POLICY, SPARES, caller("set"))
        assert made == await bus.ask(GET_FENCING_POLICY, GetById(id=CLUSTER.id))
        assert await kept(bus) == [made]
        with pytest.raises(Refused, match="at revision 1, not 7") as stale:
            await bus.ask(SET_FENCING_POLICY, replace(SPARES, if_revision=7), caller("set"))
        assert stale.value.kind is Kind.STALE
        with pytest.raises(Refused, match="connectivity_broken_percent is 1 to 100 %, not 0"):
            await bus.ask(SET_FENCING_POLICY, replace(SPARES, connectivity_broken_percent=0), caller("set"))
        with pytest.raises(Refused) as unknown:
            await bus.ask(SET_FENCING_POLICY, replace(SPARES, id=new_id()), caller("set"))
        assert unknown.value.kind is Kind.NOT_FOUND
        await owner.says(CLUSTER_DELETED, CLUSTER)

        async def gone() -> bool:
            return await kept(bus) == []

        await until(gone)
