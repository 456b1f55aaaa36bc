"""Choosing: a decision with its explanation, and what is kept of it. Nothing is claimed or written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from msgspec.structs import replace

from services.scheduler import decision_store, model, store
from services.scheduler.cells import claims_of, needs_of
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import Fleet
from services.scheduler.pages import pages_taken
from services.scheduler.policies.bound import Bound
from services.scheduler.policies.decision import (
    NAMED_HOSTS,
    Decision,
    decide,
    explain,
    hopeless,
    mend,
    possible,
    sentence,
)
from services.scheduler.policies.devices import choose as choose_devices
from services.scheduler.policies.pinned import given
from services.scheduler.policies.request import Request, request
from services.scheduler.policies.resized import shape_at
from services.scheduler.state import Scheduler
from volery.contracts.cpus import GivenCpus, PinningPolicy
from volery.contracts.errors import conflict
from volery.contracts.host_devices import GivenDevice
from volery.contracts.ids import new_id
from volery.contracts.scheduling import Claim, PastDecision, Place, Placement
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.tables import Row

Claims = Sequence[Row[Claim, store.ClaimPrivate]]


def choose(scheduler: Scheduler, ask: Place, bound: Bound) -> Placement:
    """As a dry run shows it."""
    return look(scheduler, ask, bound).told(shown(scheduler.config))


def look(scheduler: Scheduler, ask: Place, bound: Bound) -> Look:
    policy = scheduler.policy(ask.need.cluster_id)
    recipe = scheduler.fleet.recipe(policy)
    asked = request(ask, policy, scheduler.config, bound, recipe=recipe, now=monotonic())
    return Look(scheduler.fleet, asked, decide(scheduler.fleet, asked))


@dataclass(frozen=True, slots=True)
class Look:
    """A decision that is explained only when somebody asks: that costs more than the decision."""

    fleet: Fleet
    asked: Request
    decision: Decision

    @property
    def fits(self) -> bool:
        return self.decision.best is not None

    @property
    def hopeless(self) -> bool:
        """What may be on its way to this replica would not help."""
        return hopeless(self.fleet, self.asked, self.decision)

    @property
    def possible(self) -> list[str]:
        """Hosts that could take the VM if they had no other."""
        rows = np.flatnonzero(possible(self.fleet, self.asked, self.decision))
        return [self.fleet.ids[row] for row in rows.tolist()]

    def best(self, count: int) -> list[str]:
        """The best so many hosts that fit."""
        rows = self.decision.first(count).tolist()
        return [self.fleet.ids[row] for row in rows if self.decision.fits[row]]

    def told(self, most: int) -> Placement:
        """With no more than `most` hosts explained. Nothing is claimed or kept yet."""
        fleet, asked, decision = self.fleet, self.asked, self.decision
        hosts = explain(fleet, asked, decision, most)
        best, mended = decision.best, mend(fleet, asked, decision)
        devices, devices_revision = _devices(fleet, asked, best)
        return Placement(
            vm_id=asked.need.vm_id,
            epoch=asked.place.epoch,
            host_id=fleet.ids[best] if best is not None else "",
            hosts=hosts,
            message=sentence(fleet, asked, decision, hosts, mended),
            vm_name=asked.need.name,
            purpose=asked.place.purpose,
            considered=int(np.count_nonzero(decision.considered)),
            fitting=decision.fitting,
            excluded_by=decision.excluded_by(),
            remedies=mended,
            cpus=_cpus(fleet, asked, best),
            shape=None if best is None else shape_at(fleet, asked, best),
            devices=devices,
            devices_revision=devices_revision,
            hopeful=best is None and not self.hopeless,
            policy_id=asked.recipe.id,
            policy_name=asked.recipe.name,
            policy_revision=asked.recipe.revision,
            selector=asked.recipe.selector,
        )


def _cpus(fleet: Fleet, asked: Request, row: int | None) -> GivenCpus | None:
    """Those that it gets on the host, under the revision that they were chosen under."""
    found = None if row is None else given(fleet, asked, row)
    if row is None or found is None:
        return None
    return replace(found, revision=fleet.held(fleet.ids[row]).revision)


def _devices(fleet: Fleet, asked: Request, row: int | None) -> tuple[tuple[GivenDevice, ...], int]:
    """The same of the host's devices."""
    if row is None or not asked.need.host_devices:
        return (), 0
    host_id = fleet.ids[row]
    found = choose_devices(fleet.devices.state_of(host_id), asked.need.host_devices) or ()
    return found, fleet.devices.held(host_id).uses


async def first_answer(scheduler: Scheduler, ask: Place, claims: Claims) -> Placement | None:
    """The placement that holds the claim of (vm_id, epoch), if there is one.

    Raises Refused(conflict) for a question from the past, and for a claim where this placement may not be.
    """
    newest = max((row.public.epoch for row in claims), default=0)
    if newest > ask.epoch:
        raise conflict(
            f"VM {ask.need.name or ask.need.vm_id} was placed under epoch {newest} meanwhile; a placement under epoch "
            f"{ask.epoch} comes too late",
            epoch=newest,
        )
    row = next((row for row in claims if row.public.epoch == ask.epoch), None)
    if row is None:
        return None
    host_id = row.public.host_id
    if host_id in ask.excluded_host_ids or ask.target_host_id not in ("", host_id):
        raise conflict(
            f"VM {ask.need.name or ask.need.vm_id} holds a claim on host {host_id} under epoch {ask.epoch}, which "
            "this placement leaves out; release it, or place under a higher epoch",
            host_id=host_id,
            claim_id=row.id,
        )
    kept = await decision_store.decision(scheduler.core.pool, row.private.decision_id)
    if kept is None:
        return Placement(
            vm_id=ask.need.vm_id,
            epoch=ask.epoch,
            host_id=host_id,
            claimed=True,
            cpus=row.public.cpus,
            shape=row.public.shape,
            devices=row.public.devices,
            message="placed before; the explanation is no longer kept",
        )
    first = msgspec.json.decode(kept, type=Placement)
    # A decision of the previous release explains every host of its cluster.
    return replace(first, hosts=first.hosts[: shown(scheduler.config)])


def claim_of(scheduler: Scheduler, ask: Place, placement: Placement) -> Claim:
    now, need, cpus, shape = utc_now(), ask.need, placement.cpus, placement.shape
    nodes = need.numa_nodes if shape is None else shape.numa_nodes
    pages = pages_taken(need.memory_bytes, need.hugepage_kib)
    return Claim(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=need.vm_id,
        epoch=ask.epoch,
        host_id=placement.host_id,
        memory_bytes=model.memory_taken(need.memory_bytes, scheduler.config, need.hugepage_kib),
        vcpus=need.vcpus if shape is None else shape.vcpus,
        state=model.TENTATIVE,
        purpose=ask.purpose,
        high_availability=need.high_availability,
        pages_2m=pages.small,
        pages_1g=pages.large,
        cells=claims_of(needs_of(nodes, need.hugepage_kib)),
        cpu_pinning="" if need.cpu_pinning.policy is PinningPolicy.NONE else need.cpu_pinning.policy,
        cpus=cpus,
        exclusive_cpus=len(cpus.exclusive) if cpus is not None else 0,
        shape=shape,
        devices=placement.devices,
        devices_revision=placement.devices_revision,
    )


def in_short(placement: Placement) -> PastDecision:
    now = utc_now()
    return PastDecision(
        id=placement.decision_id,
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=placement.vm_id,
        vm_name=placement.vm_name,
        epoch=placement.epoch,
        purpose=placement.purpose,
        host_id=placement.host_id,
        host_name=placement.hosts[0].name if placement.host_id else "",
        message=placement.message,
    )


def shown(config: SchedulerConfig) -> int:
    """Decisions stay small however large the cluster is; but a sentence's hosts are always explained."""
    return max(config.explained_hosts, NAMED_HOSTS)
