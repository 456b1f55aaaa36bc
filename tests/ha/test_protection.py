"""The protection of VMs is kept current: with the real scheduler, and an inventory that says what VMs need."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.ha.places import GIB, place, set_power
from tests.ha.site import caller
from tests.ha.world import CLUSTER_ID, until, vm
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Refused
from volery.contracts.host import HostStatus
from volery.contracts.operation import ListQuery
from volery.contracts.power import PAUSE_FENCING, RESUME_FENCING, PauseFencing, ResumeFencing
from volery.contracts.protection import GET_PROTECTION, LIST_PROTECTION, VmProtection
from volery.contracts.storage import FIND_LEASE_PROOFS, FindLeaseProofs, LeaseProofs
from volery.contracts.vm import VM_CHANGED, VM_DELETED, HighAvailability
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings


async def test_a_vm_becomes_protected_step_by_step_and_says_what_is_missing(
    configured: Settings, tmp_path: Path
) -> None:
    """Whichever of two replicas is asked to set something."""
    events_alone = {"VOLERY_HA_PROTECTION_LONGEST_SECONDS": "600"}
    async with place(configured, tmp_path, replicas=2, **events_alone) as at:
        first, second = at.hosts
        said = await at.is_said(at.web.id, "no_proof")
        assert (said.vm_name, said.cluster_id, said.host_id) == ("web", CLUSTER_ID, first.id)
        assert "host h0 has no power management" in said.reasons[0].message
        await set_power(at.bus, first.id, 0)
        await at.is_said(at.web.id, protected=True)

        await at.bus.ask(PAUSE_FENCING, PauseFencing(seconds=600, reason="a new switch"), caller("pause"))
        paused = await at.is_said(at.web.id, "fencing_paused")
        assert "a new switch" in paused.reasons[0].message
        await at.bus.ask(RESUME_FENCING, ResumeFencing(), caller("resume"))
        await at.is_said(at.web.id, protected=True)

        await at.says_host(1, status=HostStatus.MAINTENANCE)
        alone = await at.is_said(at.web.id, "no_other_host")
        assert "h1 is maintenance, not up" in alone.reasons[0].message
        assert alone.reasons[0].change == "activate h1"
        await at.says_host(1, status=HostStatus.UP)
        await at.is_said(at.web.id, protected=True)

        web = await at.says_vm(at.web, memory_bytes=16 * GIB)
        full = await at.is_said(at.web.id, "capacity")
        assert "h1 has" in full.reasons[0].message
        web = await at.says_vm(web, memory_bytes=GIB, host_id=second.id)
        await at.is_said(at.web.id, "no_proof")
        await at.says_vm(web, high_availability=HighAvailability())

        async def forgotten() -> bool:
            return not (await at.bus.ask(LIST_PROTECTION, ListQuery())).items

        await until(forgotten)
        with pytest.raises(Refused, match="there is no protection of VM"):
            await at.bus.ask(GET_PROTECTION, GetById(id=at.web.id))


@dataclass
class Leases(Speaker):
    """A storage that says whose death a lease could prove."""

    owner: Owner = Owner.STORAGE
    domains: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = [(FIND_LEASE_PROOFS, self._say)]

    async def _say(self, _: Speaker, ask: FindLeaseProofs, caller: Caller) -> LeaseProofs:
        return LeaseProofs(domains=self.domains)


async def test_a_lease_that_would_prove_its_hosts_death_protects_a_vm_without_a_bmc(
    configured: Settings, tmp_path: Path
) -> None:
    storage = Leases()
    async with running(configured, storage.service()), place(configured, tmp_path) as at:
        await at.is_said(at.web.id, "no_proof")
        storage.domains = {at.hosts[1].id: "shared"}
        web = await at.says_vm(at.web)
        await at.is_said(at.web.id, "no_proof")
        storage.domains = {at.hosts[0].id: "shared"}
        await at.is_said(at.web.id, protected=True)
        storage.domains = {}
        await at.says_vm(web)
        await at.is_said(at.web.id, "no_proof")


async def test_what_is_on_its_way_keeps_what_was_said_and_what_is_gone_is_forgotten(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        await at.is_said(at.web.id, "no_proof")
        db = vm(name="db", cluster_id=CLUSTER_ID, host_id=at.hosts[1].id, memory_bytes=GIB)
        await at.owner.says(VM_CHANGED, db)
        before = await at.is_said(db.id, "no_proof")
        moving = await at.says_vm(db, busy_with="inventory-1", host_id="")
        asked = at.owner.asked_about

        async def asked_again() -> bool:
            return at.owner.asked_about >= asked + 3

        await until(asked_again)
        assert await at.bus.ask(GET_PROTECTION, GetById(id=db.id)) == before
        await at.owner.says(VM_DELETED, replace(moving, revision=9))

        async def only_web() -> bool:
            page = await at.bus.ask(
                LIST_PROTECTION, ListQuery(filter={"cluster_id": CLUSTER_ID, "protected": "false"})
            )
            return [msgspec.json.decode(i, type=VmProtection).vm_id for i in page.items] == [at.web.id]

        await until(only_web)


async def test_hundreds_of_vms_are_judged_within_seconds_and_written_once(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        await at.is_said(at.web.id, "no_proof")
        many = [
            vm(name=f"vm{n:03}", cluster_id=CLUSTER_ID, host_id=at.hosts[0].id, memory_bytes=GIB)
            for n in range(399)
        ]
        at.owner.knows(*many)
        began = time.monotonic()
        await at.owner.says(VM_CHANGED, *many)

        async def all_said() -> bool:
            found = await at.bus.ask(LIST_PROTECTION, ListQuery(limit=1000, filter={"protected": "false"}))
            return len(found.items) == 400

        await until(all_said, 60)
        assert time.monotonic() - began < 30
        asked = at.owner.asked_about

        async def all_judged_again() -> bool:
            return at.owner.asked_about >= asked + 800

        await until(all_judged_again, 60)
        page = await at.bus.ask(LIST_PROTECTION, ListQuery(limit=1000))
        assert {msgspec.json.decode(item, type=VmProtection).revision for item in page.items} == {1}
