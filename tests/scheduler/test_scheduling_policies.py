"""Scheduling policies on a real bus and database: made and refused, given to clusters, and followed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from services.scheduler import affinity
from services.scheduler.policies.filters import FILTERS
from services.scheduler.policies.recipe import BUILT_IN, BY_BALANCE, Recipe
from services.scheduler.policies.units import BY_KIND, MANDATORY, OPTIONAL
from services.scheduler.policies.weights import WEIGHTS
from services.scheduler.policy_store import POLICIES
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    MIB,
    NOW,
    cluster,
    host,
    hosts_known,
    network_owner,
    placing,
    scheduler,
    until,
)
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Done, Owner, encode
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    CLUSTER_DELETED,
    GET_CLUSTER,
    LIST_CLUSTERS,
    Balance,
    Cluster,
    DeleteById,
    GetById,
)
from volery.contracts.errors import Kind, Refused, not_found
from volery.contracts.host import HOST_CHANGED, LIST_HOSTS, Host
from volery.contracts.ids import new_id
from volery.contracts.metrics import METRICS_SUBJECT, HostSample
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import GET_DECISION, PLACE, GetDecision, Placement
from volery.contracts.scheduling_policy import (
    CREATE_SCHEDULING_POLICY,
    DELETE_SCHEDULING_POLICY,
    GET_CLUSTER_BALANCE,
    GET_CLUSTERS_POLICY,
    GET_SCHEDULING_POLICY,
    GIVE_SCHEDULING_POLICY,
    LIST_POLICY_UNITS,
    LIST_SCHEDULING_POLICIES,
    SCHEDULING_POLICY_CHANGED,
    UPDATE_SCHEDULING_POLICY,
    CreateSchedulingPolicy,
    GiveSchedulingPolicy,
    ListPolicyUnits,
    SchedulingPolicy,
    Selector,
    UnitKind,
    UpdateSchedulingPolicy,
)
from volery.contracts.vm import LIST_VMS, Vm
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.tables import Stale

CALLER = Caller("user:ann")
EVEN = BY_BALANCE[Balance.EVENLY_DISTRIBUTED]


async def one(speaker: Speaker, ask: GetById, caller: Caller) -> Any:
    if ask.id not in speaker.objects:
        raise not_found("cluster", ask.id)
    return speaker.objects[ask.id]


@dataclass
class Site:
    """A cluster with a large host h0 and a small one h1, and schedulers."""

    bus: Bus
    owner: Speaker
    cluster: Cluster
    hosts: list[Host]
    schedulers: list[Scheduler]

    async def make(self, name: str, **fields: Any) -> SchedulingPolicy:
        ask = CreateSchedulingPolicy(name=name, **fields)
        return await self.bus.ask(CREATE_SCHEDULING_POLICY, ask, Caller("user:ann", new_id(), "x"))

    async def change(self, policy: SchedulingPolicy, **fields: Any) -> SchedulingPolicy:
        ask = UpdateSchedulingPolicy(id=policy.id, **fields)
        return await self.bus.ask(UPDATE_SCHEDULING_POLICY, ask, Caller("user:ann", new_id(), "x"))

    async def give(self, policy_id: str, cluster_id: str = "") -> SchedulingPolicy:
        ask = GiveSchedulingPolicy(cluster_id=cluster_id or self.cluster.id, policy_id=policy_id)
        return await self.bus.ask(GIVE_SCHEDULING_POLICY, ask, Caller("user:ann", new_id(), "x"))

    async def get(self, policy: SchedulingPolicy) -> SchedulingPolicy:
        return await self.bus.ask(GET_SCHEDULING_POLICY, GetById(id=policy.id))

    async def holds(self) -> SchedulingPolicy:
        return await self.bus.ask(GET_CLUSTERS_POLICY, GetById(id=self.cluster.id))

    async def place(self, **fields: Any) -> Placement:
        return await self.bus.ask(PLACE, placing(self.cluster.id, memory_bytes=MIB, **fields))

    def name_of(self, host_id: str) -> str:
        return next((h.name for h in self.hosts if h.id == host_id), "")


@asynccontextmanager
async def site(configured: Settings, *, replicas: int = 1, **fields: Any) -> AsyncIterator[Site]:
    lists = [(LIST_CLUSTERS, Cluster), (LIST_HOSTS, Host), (LIST_VMS, Vm)]
    owner, c = Speaker(Owner.INVENTORY, lists, [(GET_CLUSTER, one)]), cluster(**fields)
    hosts = [host(c.id, name="h0", memory_bytes=64 * GIB), host(c.id, name="h1")]
    opened: list[Scheduler] = []
    programs = [scheduler(opened) for _ in range(replicas)]
    async with running(configured, owner.service(), network_owner().service(), *programs) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, len(hosts))
        yield Site(bus, owner, c, hosts, opened)


async def listed(bus: Bus, **filter_: str) -> dict[str, SchedulingPolicy]:
    page = await bus.ask(LIST_SCHEDULING_POLICIES, ListQuery(filter=filter_))
    found = [msgspec.json.decode(item, type=SchedulingPolicy) for item in page.items]
    return {policy.name: policy for policy in found}


def test_units_and_rules_are_the_same() -> None:
    """Every rule is told as a unit, and every unit does something."""
    assert list(BY_KIND[UnitKind.FILTER]) == [f.name for f in FILTERS]
    assert list(BY_KIND[UnitKind.WEIGHT]) == list(WEIGHTS)
    assert set(BY_BALANCE) == {str(balance) for balance in Balance}


def test_what_another_release_wrote_is_read_without_what_this_one_does_not_know() -> None:
    """A unit of a later release, or a filter that can't be left out and wasn't there when the policy was made."""
    policy = msgspec.structs.replace(
        EVEN, id=new_id(), filters=("swap", "of_tomorrow"), weights={"cpu_even": 1.0, "of_tomorrow": 9.0}
    )
    recipe = Recipe.of(policy)
    assert recipe.filters == {*MANDATORY, "swap"}
    assert recipe.weights == (("cpu_even", 1.0),)
    tampered = Recipe.of(msgspec.structs.replace(EVEN, weights={}, revision=7))
    assert (tampered.weights, tampered.revision) == (Recipe.of(EVEN).weights, 7)


async def test_policies_are_made_copied_changed_listed_and_deleted(configured: Settings) -> None:
    async with site(configured) as at:
        assert set(await listed(at.bus, built_in="true")) == {*map(str, Balance), "packing"}
        made = await at.make("plain", description="mine")
        assert (made.revision, made.built_in, made.cluster_ids) == (1, False, ())
        assert (made.filters, made.weights, made.balance) == (EVEN.filters, EVEN.weights, EVEN.balance)
        saving = BY_BALANCE[Balance.POWER_SAVING]
        copied = await at.make("saving", copy_of=saving.id, parameters={"HighUtilization": 60})
        assert (copied.weights, copied.parameters) == (saving.weights, {"HighUtilization": 60})
        again = await at.make("again", copy_of=copied.id, selector=Selector.RANK)
        assert (again.parameters, again.selector, again.description) == (copied.parameters, "rank", "")
        assert set(await listed(at.bus, built_in="false")) == {"plain", "saving", "again"}

        kept = tuple(f for f in made.filters if f != "swap")
        new = await at.change(made, if_revision=1, filters=kept, weights={"memory_even": 3})
        assert (new.revision, new.filters, new.weights) == (2, kept, {"memory_even": 3})
        assert new.description == "mine"
        with pytest.raises(Refused, match="somebody changed it meanwhile") as refused:
            await at.change(made, if_revision=1, description="late")
        assert refused.value.kind is Kind.STALE
        assert await at.get(made) == new
        gone = DeleteById(id=made.id, if_revision=2)
        assert await at.bus.ask(DELETE_SCHEDULING_POLICY, gone, CALLER) == Done()
        with pytest.raises(Refused, match="there is no scheduling policy"):
            await at.get(made)

        units = (await at.bus.ask(LIST_POLICY_UNITS, ListPolicyUnits())).units
        fixed = {unit.name: unit.mandatory for unit in units if unit.mandatory}
        assert set(fixed) == set(MANDATORY)
        assert {u.name for u in units if u.kind == "filter" and not u.mandatory} == set(OPTIONAL)
        (overload,) = [u for u in units if u.name == "cpu_overload"]
        assert [(p.name, p.low, p.high) for p in overload.parameters] == [
            ("HighUtilization", 50, 99),
            ("CpuOverCommitDurationMinutes", 0, 1440),
        ]


FILTER_NAMES = EVEN.filters
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "1 to 255 characters"),
    "a name that is taken": ({"name": "taken"}, "named 'taken' already; choose another name"),
    "a built-in one's name": ({"name": "power_saving"}, "named 'power_saving' already"),
    "unknown filter": ({"filters": (*FILTER_NAMES, "swapp")}, "no filter 'swapp': did you mean swap?"),
    "oVirt's name": ({"filters": (*FILTER_NAMES, "CPUOverloaded")}, "did you mean cpu_overload?"),
    "a weight for a filter": ({"filters": (*FILTER_NAMES, "guests_even")}, "no filter 'guests_even'"),
    "nothing like it": ({"weights": {"zzz": 1}}, "no weight 'zzz': There are cpu_even, memory_even"),
    "unknown weight": ({"weights": {"cpu_evn": 1}}, "no weight 'cpu_evn': did you mean cpu_even?"),
    "twice": ({"filters": (*FILTER_NAMES, "swap")}, "filter swap is named twice"),
    "left out": ({"filters": ("swap",)}, "add cluster, target, host_state"),
    "left out, why": (
        {"filters": tuple(f for f in FILTER_NAMES if f != "memory")},
        "add memory (memory: a claim beyond it would be refused when it is written, whatever the policy)",
    ),
    "negative factor": ({"weights": {"cpu_even": -1}}, "above 0 to 1000, not -1; leave the weight out"),
    "factor zero": ({"weights": {"cpu_even": 0}}, "above 0 to 1000, not 0; leave the weight out"),
    "absurd factor": ({"weights": {"cpu_even": 1e9}}, "weight cpu_even is above 0 to 1000, not 1e+09"),
    "unknown balance": ({"balance": "even_spread"}, "no balance 'even_spread': did you mean even_"),
    "unknown parameter": ({"parameters": {"HighUtilisation": 80}}, "did you mean HighUtilization?"),
    "out of range": ({"parameters": {"HighUtilization": 30}}, "HighUtilization is 50 to 99 %, not 30"),
    "above": ({"parameters": {"MaximumAllowedSwapUsage": 200}}, "is 0 to 199 %, not 200"),
    "not whole": ({"parameters": {"HighUtilization": 80.5}}, "a whole number of 50 to 99 %, not 80.5"),
    "of no use": (
        {"parameters": {"HighVmCount": 5}},
        "it belongs to balance even_guest_distribution and balance even_overall_distribution; add one of these, or leave the parameter out",
    ),
    "copy of nothing": ({"copy_of": "?"}, "there is no scheduling policy"),
}  # fmt: skip


async def test_what_can_not_be_is_refused_with_what_to_do(configured: Settings) -> None:
    async with site(configured) as at:
        await at.make("taken")
        other = await at.make("other")
        before = await listed(at.bus)
        for case, (fields, words) in BAD.items():
            given = {name: new_id() if value == "?" else value for name, value in fields.items()}
            with pytest.raises(Refused) as refused:
                await at.make(**({"name": "x"} | given))
            assert words in refused.value.message, case
            if "copy_of" not in given:
                with pytest.raises(Refused) as refused:
                    await at.change(other, **given)
                assert words in refused.value.message, case
        for policy in BUILT_IN.values():
            with pytest.raises(Refused, match="is built in and can't be changed: make a copy of it"):
                await at.change(policy, description="mine")
            with pytest.raises(Refused, match="is built in and can't be deleted"):
                await at.bus.ask(DELETE_SCHEDULING_POLICY, DeleteById(id=policy.id), CALLER)
        for policy_id, cluster_id, words in (
            (new_id(), at.cluster.id, "there is no scheduling policy"),
            (other.id, new_id(), "there is no cluster"),
            (other.id, "Default", "is not the id of a cluster"),
        ):
            with pytest.raises(Refused, match=words):
                await at.give(policy_id, cluster_id)
        assert await listed(at.bus) == before


async def test_the_next_placement_goes_by_what_was_changed_and_says_so(configured: Settings) -> None:
    """On every replica, however soon it comes."""
    async with site(configured, replicas=2) as at:
        by_balance = await at.place()
        assert (by_balance.policy_id, by_balance.policy_name) == (EVEN.id, EVEN.name)
        assert "scheduling policy" not in by_balance.message
        assert at.name_of(by_balance.host_id) == "h0"
        policy = await at.make("fill", weights={"memory_saving": 1})
        lower, higher = sorted(h.id for h in at.hosts)  # without any weight the lower id decides
        given = await at.give(policy.id)
        assert (given.name, given.cluster_ids) == ("fill", (at.cluster.id,))
        assert await at.holds() == given
        for round_ in range(10):
            # What each replica knows of others' claims is up to a second old, so nothing here depends on them.
            counts = round_ % 2 == 0
            given = await at.change(policy, weights={"preferred_hosts": 1} if counts else {})
            placed = await asyncio.gather(*(at.place(preferred_host_ids=(higher,)) for _ in range(4)))
            assert {p.policy_revision for p in placed} == {given.revision}
            assert {p.host_id for p in placed} == {higher if counts else lower}, round_
        assert f"by scheduling policy fill (revision {given.revision})" in placed[0].message
        kept = await at.bus.ask(GET_DECISION, GetDecision(id=placed[0].decision_id))
        assert (kept.policy_id, kept.policy_revision, kept.selector) == (
            policy.id,
            given.revision,
            "weighted_sum",
        )
        again = await at.give("")
        assert (again.name, (await at.get(policy)).cluster_ids) == (EVEN.name, ())
        assert (await at.place()).policy_id == EVEN.id


async def test_what_was_decided_by_an_older_policy_is_never_committed(configured: Settings) -> None:
    async with site(configured) as at:
        (mine,), need = at.schedulers, placing(at.cluster.id).need
        policy = await at.make("own")
        for change in (
            at.give(policy.id),
            at.change(policy, weights={"cpu_even": 1}),
            at.give(BY_BALANCE[Balance.POWER_SAVING].id),
            at.give(""),
        ):
            _, guards = await affinity.bind(mine, need)
            await mine.core.commit(*guards)
            await change
            with pytest.raises(Stale):
                await mine.core.commit(*guards)
        await at.give(policy.id)
        mine.fleet.recipes.clear()
        await mine.read_rules(at.cluster.id)  # with the rules comes what they guard
        assert mine.fleet.recipe(mine.policy(at.cluster.id)).name == "own"
        unused, (_, guards) = await at.make("unused"), await affinity.bind(mine, need)
        await at.change(unused, description="nobody's placements")
        await mine.core.commit(*guards)


async def test_a_built_in_policy_can_be_given_and_a_closed_cluster_is_opened_as_it_says(
    configured: Settings,
) -> None:
    async with site(configured) as at:
        closed = BY_BALANCE[Balance.CLUSTER_MAINTENANCE]
        await at.give(closed.id)
        refused = await at.place()
        assert refused.host_id == ""
        (remedy,) = refused.remedies
        assert remedy.changes[0].field == "scheduling_policy_id"
        await at.give(str(remedy.changes[0].wanted))
        assert (await at.place()).host_id
        copy = await at.make("copy", copy_of=closed.id)
        await at.give(copy.id)
        refused = await at.place()
        (change,) = refused.remedies[0].changes
        assert (change.object_id, change.field, change.current) == (copy.id, "filters", "cluster_maintenance")
        await at.change(copy, filters=tuple(f for f in copy.filters if f != change.current))
        assert (await at.place()).host_id


async def test_a_policy_in_use_is_not_deleted_and_a_cluster_has_one_whoever_races(
    configured: Settings,
) -> None:
    async with site(configured, replicas=2) as at:
        policies = [await at.make(f"p{n}") for n in range(3)]
        await at.give(policies[0].id)
        with pytest.raises(Refused) as refused:
            await at.bus.ask(DELETE_SCHEDULING_POLICY, DeleteById(id=policies[0].id), CALLER)
        assert refused.value.kind is Kind.CONFLICT
        assert "p0 is in use by cluster Default: give them another one, or none" in refused.value.message
        for _ in range(5):
            await asyncio.gather(*(at.give(policy.id) for policy in policies * 3))
            having = [p.id for p in (await listed(at.bus)).values() if at.cluster.id in p.cluster_ids]
            assert having == [(await at.holds()).id]
            await at.give("")
        for n in range(10):
            await at.give("")
            racing = await at.make(f"r{n}")
            gone = at.bus.ask(DELETE_SCHEDULING_POLICY, DeleteById(id=racing.id), CALLER)
            given, deleted = await asyncio.gather(at.give(racing.id), gone, return_exceptions=True)
            assert isinstance(given, Refused) != isinstance(deleted, Refused), (given, deleted)
            expected = EVEN.id if isinstance(given, Refused) else racing.id
            assert (await at.holds()).id == expected
            assert (await at.place()).policy_id == expected


async def test_a_deleted_cluster_leaves_its_policy(configured: Settings) -> None:
    async with site(configured) as at:
        policy = await at.make("own")
        await at.give(policy.id)
        other = cluster(name="Other")
        await at.owner.says(CLUSTER_CHANGED, other)

        async def given() -> bool:
            try:
                await at.give(policy.id, other.id)
            except Refused:
                return False
            return True

        await until(given)
        assert set((await at.get(policy)).cluster_ids) == {at.cluster.id, other.id}
        await at.owner.says(CLUSTER_DELETED, other)

        async def left() -> bool:
            return (await at.get(policy)).cluster_ids == (at.cluster.id,)

        await until(left, 20)
        assert (await at.holds()).id == policy.id


async def test_a_policy_s_own_utilisation_says_when_a_host_is_busy(configured: Settings) -> None:
    async with site(configured) as at:
        at_once = {"CpuOverCommitDurationMinutes": 0.0001}
        strict = await at.make("strict", parameters=at_once | {"HighUtilization": 75})
        await at.give(strict.id)

        async def refused() -> bool:
            for h in at.hosts:
                subject = METRICS_SUBJECT.format(host_id=h.id)
                await at.bus.client.publish(subject, encode(sample(h.id, 70.0)))
            return (await at.place(place={"dry_run": True})).excluded_by == {"cpu_overload": 2}

        for _ in range(20):
            assert not await refused()
        await at.change(strict, parameters=at_once | {"HighUtilization": 60})
        await until(refused)
        seen = await at.bus.ask(GET_CLUSTER_BALANCE, GetById(id=at.cluster.id))
        assert {(h.name, str(h.load), h.cpu_percent) for h in seen.hosts} == {
            ("h0", "too_much", 70.0),
            ("h1", "too_much", 70.0),
        }
        assert (seen.balance, seen.policy_name) == ("even_distribution", "strict")


async def test_a_built_in_policy_that_another_release_wrote_is_put_right(configured: Settings) -> None:
    async with site(configured) as at:
        (mine,) = at.schedulers
        await at.give(EVEN.id)
        row = await POLICIES.get(mine.core.pool, EVEN.id)
        await mine.core.commit(POLICIES.update(row, msgspec.structs.replace(row.public, weights={})))

        async def right() -> bool:
            return (await at.get(EVEN)).weights == EVEN.weights

        await until(right, 20)
        assert (await at.get(EVEN)).cluster_ids == (at.cluster.id,)


def sample(host_id: str, cpu_percent: float) -> HostSample:
    return HostSample(
        host_id=host_id, boot_id="b", at=NOW, cpu_percent=cpu_percent, memory_bytes=GIB, memory_used_bytes=1
    )


async def test_changes_are_announced(configured: Settings) -> None:
    async with site(configured) as at:
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def hear(message: Any) -> None:
            heard.put_nowait(message.data)

        policy = await at.make("own")
        subject = SCHEDULING_POLICY_CHANGED.subject_for(policy)
        await at.bus.client.subscribe(subject, cb=hear)
        await at.bus.client.flush()
        await at.give(policy.id)
        async with asyncio.timeout(10):
            event = msgspec.json.decode(await heard.get())
        while event["data"]["revision"] < 2:
            event = msgspec.json.decode(await heard.get())
        assert event["type"] == "dev.volery.scheduler.scheduling_policy.changed"
        assert event["data"]["cluster_ids"] == [at.cluster.id]
