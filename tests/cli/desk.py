"""A person at a terminal, and services that answer with what is told here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
from typer.testing import CliRunner, Result

from tests.api_gateway.scripted import NOW, Deployed, entity, operation, vm
from volery.cli.main import app
from volery.contracts import affinity_group as a
from volery.contracts import plan as n
from volery.contracts import power as p
from volery.contracts import promise as m
from volery.contracts import protection as r
from volery.contracts import scheduling_policy as c
from volery.contracts import soft_fence as s
from volery.contracts import start_group as g
from volery.contracts.base import Call, Done, Entity, encode
from volery.contracts.cluster import LIST_CLUSTERS, UPDATE_CLUSTER, Cluster
from volery.contracts.fencing import FenceDevice, PowerAction, PowerState
from volery.contracts.host import LIST_HOSTS, Host
from volery.contracts.ids import new_id
from volery.contracts.liveness import GET_LIVENESS, Evidence, HostLiveness, LivenessState
from volery.contracts.operation import ListQuery, OperationState, Page
from volery.contracts.storage import LIST_STORAGE_DOMAINS, DomainKind, StorageDomain
from volery.contracts.vm import CREATE_VM, LIST_VMS, UPDATE_VM, HighAvailability

HOST = Host(**entity(name="h1", cluster_id=new_id(), data_center_id=new_id()))
CLUSTER = Cluster(**entity(name="Default", data_center_id=new_id()))
DOMAIN = StorageDomain(**entity(name="shared", kind=DomainKind.DIRECTORY))
WEB, DB = vm(name="web1"), vm(name="db1", high_availability=HighAvailability(enabled=True, priority=70))
FIRST = g.StartGroup(**entity(name="databases", cluster_id=CLUSTER.id, vm_ids=(DB.id,)))
SPREAD = a.AffinityGroup(**entity(name="spread", cluster_id=CLUSTER.id, vm_ids=(DB.id,), broken=("on h9",)))
EVEN = c.SchedulingPolicy(
    **entity(name="evenly_distributed", built_in=True, filters=("cpu", "swap"), weights={"cpu_even": 2.0})
)
OWN = c.SchedulingPolicy(
    **entity(
        name="own", filters=("cpu", "swap"), weights={"cpu_even": 2.0}, parameters={"HighUtilization": 70.0}
    )
)
MOVE = n.PlanStep(
    vm_id=new_id(), vm_name="web1", source_host_id=HOST.id, source_host_name="h1", target_host_id=new_id(),
    target_host_name="h2",
)  # fmt: skip
MOVES = n.Plan(
    **entity(
        cluster_id=CLUSTER.id,
        kind=n.PlanKind.BALANCE,
        message="moves 1 VM away from 1 host",
        steps=(MOVE,),
        unplaced=(n.Unplaced(vm_id=new_id(), vm_name="db", reason="it is pinned"),),
    )
)
UNIT = c.PolicyUnit(
    name="memory",
    kind=c.UnitKind.FILTER,
    description="has too little",
    ovirt_name="Memory",
    mandatory="a claim needs it",
)
BALANCED = c.ClusterBalance(
    cluster_id=CLUSTER.id, policy_id=OWN.id, policy_name="own", policy_revision=7, balance="power_saving",
    hosts=(c.HostLoad(host_id=HOST.id, name="h1", load=c.Load.LITTLE, cpu_percent=3.0),),
)  # fmt: skip
POWER = p.PowerManagement(
    **entity(host_name="h1", devices=(FenceDevice(agent="fence_redfish", address="bmc1"),), test_passed=True)
    | {"id": HOST.id}
)
LIVENESS = HostLiveness(
    **entity(
        host_name="h1",
        state=LivenessState.NON_RESPONSIVE,
        fencing="host h1: its BMC can't be asked",
        evidence=(
            Evidence(kind="bmc", at=NOW, power="unknown", by="host h2", details="no route"),
            Evidence(kind="peer", at=NOW, reached="answers", by="host h3", details="libvirt: answers"),
        ),
    )
)
PAUSE = p.FencingPause(**entity(scope=p.FencingScope.GLOBAL, until=NOW + timedelta(hours=1), paused_by="ann"))
POLICY = p.FencingPolicy(**entity(skip_while_lease_alive=True) | {"id": CLUSTER.id})
SOFT = s.SoftFence(
    **entity(host_name="h1", address="10.0.0.1", authorized_key="restrict ssh-ed25519 AAAA", test_passed=True)
    | {"id": HOST.id}
)
RECORD = p.FenceRecord(**entity(host_id=HOST.id, host_name="h1", reason="silent", requested_by="service:ha"))


def reason(code: r.ReasonCode, message: str, change: str) -> r.ProtectionReason:
    return r.ProtectionReason(code=code, message=message, change=change)


UNPROTECTED = r.VmProtection(
    **entity(
        vm_id=WEB.id,
        vm_name="web1",
        reasons=(
            reason(r.ReasonCode.NO_PROOF, "host h1 has no power management", "set it"),
            reason(r.ReasonCode.CAPACITY, "no host has 4 GiB", "free memory on h2"),
        ),
    )
)
PROTECTED = r.VmProtection(**entity(vm_id=DB.id, vm_name="db1", protected=True))
LOSS = m.HostLoss(
    host_ids=(HOST.id,),
    host_names=("h1",),
    survived=False,
    vms=(
        m.LostVm(vm_id=WEB.id, name="web1", message="no host can take VM web1"),
        m.LostVm(vm_id=DB.id, name="db1", host_id="h2", host_name="h2"),
    ),
)
PROMISE = m.ClusterPromise(
    **entity(
        cluster_id=CLUSTER.id,
        cluster_name="Default",
        host_failures=1,
        kept=False,
        message="if h1 were lost, VM web1 would have no place",
        change="add a host",
        breaking=(LOSS,),
    )
)
RESERVE = r.ClusterReserve(
    **entity(
        cluster_id=CLUSTER.id,
        cluster_name="Default",
        host_failures=1,
        kept=False,
        message="h1 could not die",
        change="add memory",
    )
)


def listed(*objects: Entity) -> Callable[[ListQuery, Any], Page]:
    """Filters as a service does."""

    def answer(query: ListQuery, caller: Any) -> Page:
        found = [
            o
            for o in objects
            if all(str(getattr(o, c)).lower() == value for c, value in query.filter.items())
            or query.filter.get("name") == getattr(o, "name", "")
        ]
        return Page(items=tuple(msgspec.Raw(encode(o)) for o in found))

    return answer


ANSWERS: dict[Call[Any, Any], Any] = {
    LIST_HOSTS: listed(HOST),
    LIST_CLUSTERS: listed(CLUSTER),
    LIST_VMS: listed(WEB, DB),
    LIST_STORAGE_DOMAINS: listed(DOMAIN),
    CREATE_VM: operation(state=OperationState.SUCCEEDED, object_name="web2", kind="vm.create"),
    UPDATE_VM: WEB,
    UPDATE_CLUSTER: CLUSTER,
    p.SET_POWER_MANAGEMENT: POWER,
    p.GET_POWER_MANAGEMENT: POWER,
    p.LIST_POWER_MANAGEMENT: listed(POWER),
    p.TEST_POWER_MANAGEMENT: POWER,
    p.DELETE_POWER_MANAGEMENT: Done(),
    p.SWITCH_POWER: p.PowerSwitched(id=HOST.id, action=PowerAction.OFF, state=PowerState.OFF),
    p.CONFIRM_HOST_REBOOTED: LIVENESS,
    GET_LIVENESS: LIVENESS,
    p.GET_FENCING: p.Fencing(
        pauses=(PAUSE,),
        brakes=(p.Brake(cluster_id=CLUSTER.id, hosts=10, ordered_off=1, limit=1, window_seconds=600.0),),
        held=(LIVENESS,),
    ),
    p.PAUSE_FENCING: PAUSE,
    p.RESUME_FENCING: Done(),
    p.GET_FENCING_POLICY: POLICY,
    p.LIST_FENCING_POLICIES: listed(POLICY),
    p.SET_FENCING_POLICY: POLICY,
    p.LIST_FENCE_RECORDS: listed(RECORD),
    s.SET_SOFT_FENCE: SOFT,
    s.GET_SOFT_FENCE: SOFT,
    s.LIST_SOFT_FENCES: listed(SOFT),
    s.TEST_SOFT_FENCE: SOFT,
    s.DELETE_SOFT_FENCE: Done(),
    r.LIST_PROTECTION: listed(UNPROTECTED, PROTECTED),
    r.GET_PROTECTION: UNPROTECTED,
    r.LIST_RESERVES: listed(RESERVE),
    m.LIST_PROMISES: listed(PROMISE),
    m.GET_PROMISE: PROMISE,
    m.LOSE_HOSTS: LOSS,
    a.LIST_AFFINITY_GROUPS: Page(items=(msgspec.Raw(encode(SPREAD)),)),
    a.CREATE_AFFINITY_GROUP: SPREAD,
    a.UPDATE_AFFINITY_GROUP: SPREAD,
    a.DELETE_AFFINITY_GROUP: Done(),
    n.MAKE_PLAN: operation(id="", result={"plan": MOVES}),
    n.LIST_PLANS: listed(MOVES),
    n.GET_PLAN: MOVES,
    n.CANCEL_PLAN: operation(),
    c.LIST_SCHEDULING_POLICIES: listed(EVEN, OWN),
    c.CREATE_SCHEDULING_POLICY: OWN,
    c.UPDATE_SCHEDULING_POLICY: OWN,
    c.DELETE_SCHEDULING_POLICY: Done(),
    c.GIVE_SCHEDULING_POLICY: OWN,
    c.GET_CLUSTERS_POLICY: OWN,
    c.GET_CLUSTER_BALANCE: BALANCED,
    c.LIST_POLICY_UNITS: c.PolicyUnits(units=(UNIT,)),
    g.LIST_START_GROUPS: listed(FIRST),
    g.CREATE_START_GROUP: FIRST,
    g.UPDATE_START_GROUP: FIRST,
    g.DELETE_START_GROUP: Done(),
}


@dataclass
class Desk:
    """A person at a terminal that is logged in."""

    at: Deployed
    token: str

    async def types(self, line: str, stdin: str = "") -> Result:
        environment = {"VOLERY_CLI_URL": self.at.url, "VOLERY_CLI_TOKEN": self.token, "COLUMNS": "300"}
        arguments = line.split()
        return await asyncio.to_thread(CliRunner().invoke, app, arguments, input=stdin, env=environment)


def device(**fields: Any) -> p.NewFenceDevice:
    made = {"agent": "fence_redfish", "address": "bmc1", "secrets": {"password": "pw"}}
    return p.NewFenceDevice(**made | fields)


SET = "host power-management set h1 --agent fence_redfish --address bmc1"
