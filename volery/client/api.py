"""The resources of the REST API, one line each."""

from __future__ import annotations

from volery.client.request import Resource
from volery.contracts.account import EventReader, Token, User
from volery.contracts.affinity_group import AffinityGroup
from volery.contracts.cluster import Cluster, DataCenter
from volery.contracts.host import Host
from volery.contracts.liveness import HostLiveness, VmRestart
from volery.contracts.network import MacPool, Network
from volery.contracts.operation import Operation
from volery.contracts.plan import Plan
from volery.contracts.power import FenceRecord, FencingPause, FencingPolicy, PowerManagement
from volery.contracts.promise import ClusterPromise
from volery.contracts.protection import ClusterReserve, VmProtection
from volery.contracts.scheduling import Claim, HostCapacity, PastDecision
from volery.contracts.scheduling_policy import SchedulingPolicy
from volery.contracts.snapshot import Snapshot
from volery.contracts.soft_fence import SoftFence
from volery.contracts.start_group import StartGroup
from volery.contracts.storage import Disk, StorageDomain, Transfer
from volery.contracts.template import Template
from volery.contracts.vm import Vm

DATA_CENTERS = Resource("data-center", "data-centers", DataCenter, ("name", "local", "id"))
CLUSTERS = Resource("cluster", "clusters", Cluster, ("name", "balance", "cpu_model", "id"))
HOSTS = Resource("host", "hosts", Host, ("name", "status", "address", "vm_count", "id"))
VMS = Resource("vm", "vms", Vm, ("name", "status", "host_id", "vcpus", "memory_bytes", "guest", "id"))
SNAPSHOTS = Resource("snapshot", "snapshots", Snapshot, ("name", "vm_id", "status", "created_at", "id"))
TEMPLATES = Resource("template", "templates", Template, ("name", "description", "id"))
STORAGE_DOMAINS = Resource(
    "storage-domain",
    "storage-domains",
    StorageDomain,
    ("name", "kind", "status", "available_bytes", "capacity_bytes", "id"),
)
DISKS = Resource("disk", "disks", Disk, ("name", "status", "format", "size_bytes", "used_bytes", "id"))
TRANSFERS = Resource(
    "transfer", "transfers", Transfer, ("id", "direction", "state", "received_bytes", "size_bytes")
)
NETWORKS = Resource("network", "networks", Network, ("name", "kind", "vlan", "bridge", "id"))
MAC_POOLS = Resource("mac-pool", "mac-pools", MacPool, ("name", "ranges", "used", "size", "id"))
OPERATIONS = Resource(
    "operation", "operations", Operation, ("kind", "object_name", "state", "progress", "created_at", "id")
)
USERS = Resource("user", "users", User, ("name", "full_name", "enabled", "id"))
TOKENS = Resource("token", "tokens", Token, ("user_name", "description", "scopes", "expires_at", "id"))
EVENT_READERS = Resource("event-reader", "event-readers", EventReader, ("name", "owners", "id"))
CLAIMS = Resource("claim", "claims", Claim, ("vm_id", "host_id", "epoch", "state", "memory_bytes", "vcpus"))
CAPACITY = Resource(
    "capacity",
    "capacity",
    HostCapacity,
    (
        "name",
        "memory_used_bytes",
        "memory_bytes",
        "vcpus_used",
        "vcpus_limit",
        "cpu_percent",
        "schedulable",
        "problem",
    ),
)
DECISIONS = Resource(
    "decision", "decisions", PastDecision, ("created_at", "vm_name", "purpose", "host_name", "message", "id")
)
LIVENESS = Resource(
    "liveness", "liveness", HostLiveness, ("host_name", "state", "last_beat_at", "fencing", "id")
)
RESTARTS = Resource("restart", "restarts", VmRestart, ("vm_name", "attempts", "reason", "gave_up", "vm_id"))
AFFINITY_GROUPS = Resource(
    "affinity-group",
    "affinity-groups",
    AffinityGroup,
    ("name", "vm_rule", "vm_enforcing", "host_rule", "host_enforcing", "priority", "broken", "id"),
)
SCHEDULING_POLICIES = Resource(
    "scheduling-policy",
    "scheduling-policies",
    SchedulingPolicy,
    ("name", "built_in", "selector", "weights", "balance", "parameters", "revision", "id"),
)
PLANS = Resource(
    "plan",
    "plans",
    Plan,
    ("created_at", "kind", "state", "message", "reason", "principal", "cluster_id", "id"),
)
START_GROUPS = Resource(
    "start-group", "start-groups", StartGroup, ("name", "vm_ids", "after", "wait_for", "wait_seconds", "id")
)
RESERVES = Resource(
    "reserve", "reserves", ClusterReserve, ("cluster_name", "host_failures", "kept", "message", "change")
)
PROMISES = Resource(
    "promise",
    "promises",
    ClusterPromise,
    ("cluster_name", "host_failures", "admission_control", "kept", "message", "change"),
)
PROTECTION = Resource(
    "protection", "protection", VmProtection, ("vm_name", "protected", "reasons", "host_id", "vm_id")
)
POWER_MANAGEMENT = Resource(
    "power management",
    "power-management",
    PowerManagement,
    ("host_name", "enabled", "identity", "power", "test_passed", "tested_at", "test_words"),
)
FENCE_RECORDS = Resource(
    "fence record",
    "fence-records",
    FenceRecord,
    ("created_at", "host_name", "state", "requested_by", "reason", "id"),
)
FENCING_PAUSES = Resource(
    "pause of fencing",
    "fencing/pauses",
    FencingPause,
    ("scope", "object_id", "until", "paused_by", "reason"),
)
SOFT_FENCES = Resource(
    "soft fencing",
    "soft-fencing",
    SoftFence,
    ("host_name", "enabled", "address", "port", "username", "test_passed", "tested_at", "test_words"),
)
FENCING_POLICIES = Resource(
    "fencing policy",
    "fencing-policies",
    FencingPolicy,
    (
        "id",
        "skip_while_lease_alive",
        "skip_if_connectivity_broken",
        "connectivity_broken_percent",
        "skip_while_peers_answer",
        "updated_at",
    ),
)

RESOURCES = (
    DATA_CENTERS,
    CLUSTERS,
    HOSTS,
    VMS,
    TEMPLATES,
    STORAGE_DOMAINS,
    DISKS,
    TRANSFERS,
    NETWORKS,
    MAC_POOLS,
    OPERATIONS,
    USERS,
    TOKENS,
    EVENT_READERS,
    CLAIMS,
    AFFINITY_GROUPS,
    SCHEDULING_POLICIES,
    PLANS,
    DECISIONS,
    LIVENESS,
    RESTARTS,
    PROTECTION,
    RESERVES,
    PROMISES,
    START_GROUPS,
    POWER_MANAGEMENT,
    FENCE_RECORDS,
    FENCING_PAUSES,
    FENCING_POLICIES,
    SOFT_FENCES,
)
