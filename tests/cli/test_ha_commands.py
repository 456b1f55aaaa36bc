"""Commands about fencing, protection, start groups and affinity groups: what they ask of services, and what they print."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.cli.desk import (
    ANSWERS,
    CLUSTER,
    DB,
    DOMAIN,
    FIRST,
    HOST,
    POWER,
    SET,
    SPREAD,
    WEB,
    Desk,
    device,
)
from volery.contracts import affinity_group as a
from volery.contracts import power as p
from volery.contracts import promise as m
from volery.contracts import protection as r
from volery.contracts import soft_fence as s
from volery.contracts import start_group as g
from volery.contracts.base import Call
from volery.contracts.cluster import UPDATE_CLUSTER, AdmissionControl
from volery.contracts.domain import NumaMode, NumaNode
from volery.contracts.fencing import PowerAction
from volery.contracts.liveness import GET_LIVENESS
from volery.contracts.vm import CREATE_VM, UPDATE_VM


@dataclass(frozen=True)
class Row:
    """A line that is typed, the call that it comes to, fields of the question, and words that are printed."""

    line: str
    call: Call[Any, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    stdin: str = ""


def power(**fields: Any) -> dict[str, Any]:
    return {"id": HOST.id, "devices": (device(**fields),), "enabled": True}


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
    Row("protection promises", m.LIST_PROMISES, {}, ("VM web1 would have no", "add a host")),
    Row("protection of Default", m.GET_PROMISE, {"id": CLUSTER.id}, ("if h1 were lost", "web1", "nowhere")),
    Row(
        "protection promise Default 2",
        UPDATE_CLUSTER,
        {"id": CLUSTER.id, "reserve_host_failures": 2, "admission_control": AdmissionControl.ENFORCE},
    ),
    Row(
        "protection promise Default 1 --control warn",
        UPDATE_CLUSTER,
        {"reserve_host_failures": 1, "admission_control": AdmissionControl.WARN},
    ),
    Row(
        "protection what-if Default --lose h1",
        m.LOSE_HOSTS,
        {"id": CLUSTER.id, "host_ids": (HOST.id,)},
        ("web1", "nowhere", "db1", "h2"),
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
    Row(
        "vm create web2 --memory 2GiB --huge-pages 1GiB",
        CREATE_VM,
        {"hugepage_kib": 1048576, "memory_bytes": 2 << 30},
    ),
    Row("vm create web2", CREATE_VM, {"hugepage_kib": 0, "numa_nodes": ()}),
    Row(
        "vm create web2 --memory 3GiB --vcpus 4 --numa-node 0-1,3:2GiB:0 --numa-node 2:1GiB:0,1",
        CREATE_VM,
        {
            "numa_nodes": (
                NumaNode(memory_bytes=2 << 30, vcpus=(0, 1, 3), host_cells=(0,)),
                NumaNode(memory_bytes=1 << 30, vcpus=(2,), host_cells=(0, 1), mode=NumaMode.INTERLEAVE),
            )
        },
    ),
    Row(
        "vm edit web1 --numa-node 0:1GiB:2:preferred",
        UPDATE_VM,
        {
            "numa_nodes": (
                NumaNode(memory_bytes=1 << 30, vcpus=(0,), host_cells=(2,), mode=NumaMode.PREFERRED),
            )
        },
    ),
    Row("vm edit web1 --numa-node none", UPDATE_VM, {"numa_nodes": ()}),
    Row("vm edit web1 --huge-pages 2MiB", UPDATE_VM, {"hugepage_kib": 2048}),
    Row("vm edit web1 --huge-pages none", UPDATE_VM, {"hugepage_kib": 0}),
    Row("vm edit web1 --vcpus 2", UPDATE_VM, {"hugepage_kib": msgspec.UNSET}),
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
    Bad("vm create web2 --numa-node 0-3", "no NUMA node like", 2),
    Bad("vm create web2 --numa-node 0-3:1GiB:0:firm", "firm", 2),
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
