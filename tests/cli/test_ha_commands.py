"""Commands about fencing, protection, start groups and affinity groups: what they ask of services, and what they print."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from tests.api_gateway.scripted import NOW, Deployed, Script, deployed, entity, operation, vm
from volery.cli.main import app
from volery.contracts import affinity_group as a
from volery.contracts import power as p
from volery.contracts import protection as r
from volery.contracts import soft_fence as s
from volery.contracts import start_group as g
from volery.contracts.base import Call, Done, Entity, encode
from volery.contracts.cluster import LIST_CLUSTERS, UPDATE_CLUSTER, Cluster
from volery.contracts.errors import not_found
from volery.contracts.fencing import FenceDevice, PowerAction, PowerState
from volery.contracts.host import LIST_HOSTS, Host
from volery.contracts.ids import new_id
from volery.contracts.liveness import GET_LIVENESS, Evidence, HostLiveness, LivenessState
from volery.contracts.operation import ListQuery, OperationState, Page
from volery.contracts.storage import LIST_STORAGE_DOMAINS, DomainKind, StorageDomain
from volery.contracts.vm import CREATE_VM, LIST_VMS, UPDATE_VM, HighAvailability
from volery.setup.embedded import Embedded

HOST = Host(**entity(name="h1", cluster_id=new_id(), data_center_id=new_id()))
CLUSTER = Cluster(**entity(name="Default", data_center_id=new_id()))
DOMAIN = StorageDomain(**entity(name="shared", kind=DomainKind.DIRECTORY))
WEB, DB = vm(name="web1"), vm(name="db1", high_availability=HighAvailability(enabled=True, priority=70))
FIRST = g.StartGroup(**entity(name="databases", cluster_id=CLUSTER.id, vm_ids=(DB.id,)))
SPREAD = a.AffinityGroup(**entity(name="spread", cluster_id=CLUSTER.id, vm_ids=(DB.id,), broken=("on h9",)))
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
    a.LIST_AFFINITY_GROUPS: Page(items=(msgspec.Raw(encode(SPREAD)),)),
    a.CREATE_AFFINITY_GROUP: SPREAD,
    a.UPDATE_AFFINITY_GROUP: SPREAD,
    a.DELETE_AFFINITY_GROUP: Done(),
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


@pytest.fixture
async def desk(nats: Embedded) -> AsyncIterator[Desk]:
    script = Script()
    for call, answer in ANSWERS.items():
        script.on(call, answer)
    async with deployed(nats.url, script) as at:
        yield Desk(at, script.token())


@dataclass(frozen=True)
class Row:
    """A line that is typed, the call that it comes to, fields of the question, and words that are printed."""

    line: str
    call: Call[Any, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    stdin: str = ""


def device(**fields: Any) -> p.NewFenceDevice:
    made = {"agent": "fence_redfish", "address": "bmc1", "secrets": {"password": "pw"}}
    return p.NewFenceDevice(**made | fields)


def power(**fields: Any) -> dict[str, Any]:
    return {"id": HOST.id, "devices": (device(**fields),), "enabled": True}


SET = "host power-management set h1 --agent fence_redfish --address bmc1"
ROWS = (
    Row(f"{SET} --password-file -", p.SET_POWER_MANAGEMENT, power(), ("bmc1",), "pw\n"),
    Row(SET, p.SET_POWER_MANAGEMENT, power(), ("Password",), "pw\n"),
    Row(
        f"{SET} --keep-password --username u --port 8443 --option ssl_insecure=1",
        p.SET_POWER_MANAGEMENT,
        power(username="u", port=8443, options={"ssl_insecure": "1"}, secrets=msgspec.UNSET),
    ),
    Row(f"{SET} --keep-password --disabled", p.SET_POWER_MANAGEMENT, {"enabled": False}),
    Row(
        f"{SET} --keep-password --kdump-address 10.0.8.7 --kdump-address fd00::7 --kdump-proves",
        p.SET_POWER_MANAGEMENT,
        {"kdump_addresses": ("10.0.8.7", "fd00::7"), "kdump_proves": True},
    ),
    Row(
        "host power-management set h1 --file -",
        p.SET_POWER_MANAGEMENT,
        {"together": True, "devices": (device(secrets={}), device(address="bmc2", secrets={}))},
        stdin='{"together": true, "devices": [{"agent": "fence_redfish", "address": "bmc1", "secrets": {}},'
        ' {"agent": "fence_redfish", "address": "bmc2", "secrets": {}}]}',
    ),
    Row(
        "host power-management set h1 --kdump-address 10.0.8.7",
        p.SET_POWER_MANAGEMENT,
        {
            "devices": (device(secrets=msgspec.UNSET),),
            "kdump_addresses": ("10.0.8.7",),
            "if_revision": POWER.revision,
        },
    ),
    Row("host power-management show h1", p.GET_POWER_MANAGEMENT, {"id": HOST.id}, ("fence_redfish",)),
    Row("host power-management list", p.LIST_POWER_MANAGEMENT, {}, ("HOST NAME", "h1")),
    Row("host power-management test h1", p.TEST_POWER_MANAGEMENT, {"id": HOST.id}),
    Row("host power-management delete h1", p.DELETE_POWER_MANAGEMENT, {"id": HOST.id}, ("deleted",)),
    Row(
        "host power h1 off --confirm h1 --reason smoke",
        p.SWITCH_POWER,
        {"id": HOST.id, "action": PowerAction.OFF, "confirm": "h1", "reason": "smoke"},
        ("off",),
    ),
    Row("host power h1 status", p.SWITCH_POWER, {"action": PowerAction.STATUS, "confirm": ""}),
    Row(
        "host confirm-rebooted h1 --confirm h1 --reason burnt",
        p.CONFIRM_HOST_REBOOTED,
        {"id": HOST.id, "confirm": "h1", "reason": "burnt"},
        ("non_responsive",),
    ),
    Row(
        "host evidence h1",
        GET_LIVENESS,
        {"id": HOST.id},
        ("h2", "no route", "answers", "h3", "host h1 is non_responsive", "its BMC can't be asked"),
    ),
    Row("host evidence h1 -o json", GET_LIVENESS, {"id": HOST.id}, ('"reached": "answers"',)),
    Row("fencing show", p.GET_FENCING, {}, ("ann", "WINDOW SECONDS", "its BMC can't be asked")),
    Row("fencing show -o json", p.GET_FENCING, {}, ('"limit": 1',)),
    Row("fencing pause", p.PAUSE_FENCING, {"scope": p.FencingScope.GLOBAL, "seconds": 3600.0}),
    Row(
        "fencing pause --cluster Default --minutes 5 --reason work",
        p.PAUSE_FENCING,
        {"scope": p.FencingScope.CLUSTER, "object_id": CLUSTER.id, "seconds": 300.0, "reason": "work"},
    ),
    Row(
        "fencing resume --host h1",
        p.RESUME_FENCING,
        {"scope": p.FencingScope.HOST, "object_id": HOST.id},
        ("fencing goes on",),
    ),
    Row("cluster fencing-policy show Default", p.GET_FENCING_POLICY, {"id": CLUSTER.id}, ("skip while",)),
    Row("cluster fencing-policy list", p.LIST_FENCING_POLICIES, {}, (CLUSTER.id,)),
    Row(
        "cluster fencing-policy set Default --skip-while-lease-alive",
        p.SET_FENCING_POLICY,
        {"id": CLUSTER.id, "skip_while_lease_alive": True, "skip_if_connectivity_broken": False},
    ),
    Row(
        "cluster fencing-policy set Default --skip-while-peers-answer",
        p.SET_FENCING_POLICY,
        {"id": CLUSTER.id, "skip_while_peers_answer": True, "skip_while_lease_alive": False},
    ),
    Row(
        "cluster fencing-policy set Default --skip-if-broken-percent 30",
        p.SET_FENCING_POLICY,
        {
            "skip_while_lease_alive": False,
            "skip_if_connectivity_broken": True,
            "connectivity_broken_percent": 30,
        },
    ),
    Row(
        "host soft-fencing set h1 --address 10.0.0.1 --host-key-file - --port 2222 --unit v-agent --new-key",
        s.SET_SOFT_FENCE,
        {
            "id": HOST.id,
            "address": "10.0.0.1",
            "host_key": "ssh-ed25519 BBBB",
            "port": 2222,
            "username": "root",
            "unit": "v-agent",
            "new_key": True,
            "enabled": True,
        },
        ("restrict ssh-ed25519 AAAA",),
        "ssh-ed25519 BBBB\n",
    ),
    Row("host soft-fencing show h1", s.GET_SOFT_FENCE, {"id": HOST.id}, ("10.0.0.1",)),
    Row("host soft-fencing list", s.LIST_SOFT_FENCES, {}, ("h1", "TEST PASSED")),
    Row("host soft-fencing test h1", s.TEST_SOFT_FENCE, {"id": HOST.id}),
    Row("host soft-fencing delete h1", s.DELETE_SOFT_FENCE, {"id": HOST.id}, ("deleted",)),
    Row(
        "fence list --host h1",
        p.LIST_FENCE_RECORDS,
        {"filter": {"host_id": HOST.id}, "order_by": "-id"},
        ("service:ha", "silent"),
    ),
    Row(
        "protection list",
        r.LIST_PROTECTION,
        {"filter": {}},
        ("db1", "host h1 has no power management", "no host has 4 GiB", "free memory on h2"),
    ),
    Row(
        "protection list Default --unprotected",
        r.LIST_PROTECTION,
        {"filter": {"cluster_id": CLUSTER.id, "protected": "false"}, "order_by": "vm_name"},
    ),
    Row("protection show web1", r.GET_PROTECTION, {"id": WEB.id}, ("set it",)),
    Row("protection show web1 -o yaml", r.GET_PROTECTION, {"id": WEB.id}, ("code: no_proof",)),
    Row("protection reserves", r.LIST_RESERVES, {}, ("h1 could not die", "add memory")),
    Row(
        "protection reserve Default 2",
        UPDATE_CLUSTER,
        {"id": CLUSTER.id, "reserve_host_failures": 2, "if_revision": CLUSTER.revision},
    ),
    Row(
        "start-group create applications --vm web1 --after databases --wait-for guest_agent --wait-seconds 90",
        g.CREATE_START_GROUP,
        {
            "name": "applications",
            "cluster_id": CLUSTER.id,
            "vm_ids": (WEB.id,),
            "after": (FIRST.id,),
            "wait_for": g.WaitFor.GUEST_AGENT,
            "wait_seconds": 90.0,
        },
    ),
    Row(
        "start-group edit databases --vm db1 --vm web1 --wait-seconds 5",
        g.UPDATE_START_GROUP,
        {
            "id": FIRST.id,
            "vm_ids": (DB.id, WEB.id),
            "wait_seconds": 5.0,
            "after": msgspec.UNSET,
            "wait_for": msgspec.UNSET,
            "if_revision": FIRST.revision,
        },
    ),
    Row("start-group list", g.LIST_START_GROUPS, {}, ("WAIT FOR", "databases")),
    Row("start-group show databases -o json", g.LIST_START_GROUPS, {}, (DB.id,)),
    Row("start-group delete databases", g.DELETE_START_GROUP, {"id": FIRST.id}, ("deleted",)),
    Row(
        "affinity-group create spread --vm web1 --vm db1 --vm-rule negative --host h1 --host-rule positive --host-wish "
        "--priority 5",
        a.CREATE_AFFINITY_GROUP,
        {
            "name": "spread",
            "cluster_id": CLUSTER.id,
            "vm_ids": (WEB.id, DB.id),
            "vm_rule": a.AffinityRule.NEGATIVE,
            "vm_enforcing": True,
            "host_ids": (HOST.id,),
            "host_rule": a.AffinityRule.POSITIVE,
            "host_enforcing": False,
            "priority": 5.0,
        },
        ("spread",),
    ),
    Row(
        "affinity-group edit spread --vm web1 --vm-wish",
        a.UPDATE_AFFINITY_GROUP,
        {
            "id": SPREAD.id,
            "vm_ids": (WEB.id,),
            "vm_enforcing": False,
            "host_ids": msgspec.UNSET,
            "vm_rule": msgspec.UNSET,
            "if_revision": SPREAD.revision,
        },
    ),
    Row("affinity-group list", a.LIST_AFFINITY_GROUPS, {}, ("spread", "on h9")),
    Row("affinity-group of web1 -o json", a.LIST_AFFINITY_GROUPS, {"filter": {"vm_id": WEB.id}}),
    Row("affinity-group delete spread", a.DELETE_AFFINITY_GROUP, {"id": SPREAD.id}, ("deleted",)),
    Row("vm create web2 --ha --lease shared", CREATE_VM, {"lease": DOMAIN.id, "start_after_blackout": None}),
    Row("vm create web2 --ha --lease none", CREATE_VM, {"lease": ""}),
    Row("vm create web2 --ha", CREATE_VM, {"lease": None}),
    Row("vm create web2 --start-after-blackout yes", CREATE_VM, {"start_after_blackout": True}),
    Row(
        "vm edit web1 --lease shared", UPDATE_VM, {"lease": DOMAIN.id, "start_after_blackout": msgspec.UNSET}
    ),
    Row("vm edit web1 --start-after-blackout no", UPDATE_VM, {"start_after_blackout": False}),
    Row("vm edit web1 --start-after-blackout default", UPDATE_VM, {"start_after_blackout": None}),
)


async def test_every_command_asks_what_its_line_says(desk: Desk) -> None:
    for row in ROWS:
        desk.at.script.asked.clear()
        result = await desk.types(row.line, row.stdin)
        assert result.exit_code == 0, (row.line, result.output, result.exception)
        (question,) = desk.at.script.questions(row.call)
        assert {name: getattr(question, name) for name in row.fields} == row.fields, row.line
        for words in row.words:
            assert words in result.output, (row.line, result.output)
        assert "pw" not in result.output.split(), row.line


@dataclass(frozen=True)
class Bad:
    """A line that asks nothing of ha, or is refused; its words, and how it ends."""

    line: str
    words: str
    status: int = 1
    stdin: str = ""


BAD = (
    Bad(f"{SET} --keep-password --option lanplus", "write NAME=VALUE"),
    Bad("host power-management set h1 --file -", "isn't a power management", stdin='{"devices": 7}'),
    Bad("host power-management set h1 --file -", "isn't a power management", stdin="[]"),
    Bad("host power-management show h9", "h9"),
    Bad("fencing pause --cluster Default --host h1", "not both"),
    Bad("start-group create x --vm web9", "web9"),
    Bad("start-group create x --wait-for coffee", "coffee", status=2),
    Bad("affinity-group create x --vm web9", "web9"),
    Bad("affinity-group create x --vm-rule near", "near", status=2),
    Bad("protection reserve Default many", "valid integer", status=2),
    Bad("vm create web2 --lease nowhere", "nowhere"),
    Bad("vm edit web1 --start-after-blackout maybe", "maybe", status=2),
)


async def test_what_can_not_be_meant_is_said_and_asked_of_nobody(desk: Desk) -> None:
    mutating = [call for call in ANSWERS if call.mutates]
    for bad in BAD:
        desk.at.script.asked.clear()
        result = await desk.types(bad.line, bad.stdin)
        assert (result.exit_code, bad.words in result.output) == (bad.status, True), (bad, result.output)
        assert [call for call in mutating if desk.at.script.questions(call)] == [], bad


DUMPS = msgspec.structs.replace(
    POWER,
    enabled=False,
    together=True,
    devices=(
        FenceDevice(agent="fence_redfish", address="bmc1", username="u", options={"ssl_insecure": "1"}),
    ),
    kdump_addresses=("10.0.8.7",),
    kdump_proves=True,
)
SAME = device(username="u", options={"ssl_insecure": "1"}, secrets=msgspec.UNSET)
KEPT = (
    ("--username v --keep-password", {"devices": (msgspec.structs.replace(SAME, username="v"),)}, ""),
    (
        "--port 8443",
        {"devices": (msgspec.structs.replace(SAME, port=8443, secrets={"password": "pw"}),)},
        "pw\n",
    ),
    ("--option a=b", {"devices": (msgspec.structs.replace(SAME, options={"a": "b"}),)}, ""),
    ("--option none", {"devices": (msgspec.structs.replace(SAME, options={}),)}, ""),
    (
        "--agent fence_ipmilan --keep-password",
        {"devices": (device(agent="fence_ipmilan", username="u", secrets=msgspec.UNSET),)},
        "",
    ),
    (
        "--agent fence_redfish --address bmc2 --keep-password",
        {"devices": (msgspec.structs.replace(SAME, address="bmc2"),)},
        "",
    ),
    ("--enabled", {"enabled": True}, ""),
    ("--no-kdump-proves", {"kdump_proves": False}, ""),
    ("--kdump-address none", {"kdump_addresses": (), "kdump_proves": False}, ""),
    ("--kdump-address 10.0.8.8 --kdump-proves", {"kdump_addresses": ("10.0.8.8",)}, ""),
    ("--file -", {"together": False}, '{"together": false}'),
)


async def test_what_is_not_named_of_power_management_stays_as_it_is(desk: Desk) -> None:
    desk.at.script.on(p.GET_POWER_MANAGEMENT, DUMPS)
    all_of_it = {
        "id": HOST.id,
        "devices": (SAME,),
        "if_revision": DUMPS.revision,
        "enabled": False,
        "together": True,
        "kdump_addresses": ("10.0.8.7",),
        "kdump_proves": True,
    }
    for line, named, stdin in KEPT:
        desk.at.script.asked.clear()
        result = await desk.types(f"host power-management set h1 {line}", stdin)
        assert result.exit_code == 0, (line, result.output, result.exception)
        (question,) = desk.at.script.questions(p.SET_POWER_MANAGEMENT)
        assert question == p.SetPowerManagement(**all_of_it | named), line


async def test_power_management_that_can_not_be_kept_is_said(desk: Desk) -> None:
    two = msgspec.structs.replace(
        POWER, devices=(*POWER.devices, FenceDevice(agent="fence_ipmilan", address="b"))
    )

    def nothing(ask: Any, caller: Any) -> p.PowerManagement:
        raise not_found("power management", HOST.id)

    bad: tuple[tuple[Any, str, str], ...] = (
        (DUMPS, "--kdump-address 10.0.8.8", "say of the new ones, too"),
        (two, "--port 8443", "it has 2 devices"),
        (nothing, "--agent fence_redfish", "name --agent and --address"),
        (nothing, "--kdump-address 10.0.8.7", "name --agent and --address"),
    )
    for known, line, words in bad:
        desk.at.script.on(p.GET_POWER_MANAGEMENT, known)
        result = await desk.types(f"host power-management set h1 {line}")
        assert (result.exit_code, words in " ".join(result.output.split())) == (1, True), (
            line,
            result.output,
        )
        assert desk.at.script.questions(p.SET_POWER_MANAGEMENT) == []
    desk.at.script.on(p.GET_POWER_MANAGEMENT, nothing)
    result = await desk.types(f"{SET} --keep-password")
    assert result.exit_code == 0, (result.output, result.exception)
    (question,) = desk.at.script.questions(p.SET_POWER_MANAGEMENT)
    assert (question.devices, question.if_revision) == ((device(secrets=msgspec.UNSET),), 0)


async def test_a_test_that_failed_is_shown_and_ends_so(desk: Desk) -> None:
    failed = msgspec.structs.replace(POWER, test_passed=False, test_words="no route to bmc1")
    desk.at.script.on(p.TEST_POWER_MANAGEMENT, failed)
    result = await desk.types("host power-management test h1")
    assert (result.exit_code, "no route to bmc1" in result.output) == (1, True), result.output
