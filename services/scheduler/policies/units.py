"""Units: what scheduling policies are made of, as a table that people and checks read.

What a unit does is in filters.py, weights.py and balance.py, under the same name.
"""

from __future__ import annotations

from volery.contracts.scheduling_policy import PolicyParameter, PolicyUnit, UnitKind

HIGH_UTILIZATION = "HighUtilization"
LOW_UTILIZATION = "LowUtilization"
OVERLOAD_MINUTES = "CpuOverCommitDurationMinutes"
VCPU_RATIO = "VCpuToPhysicalCpuRatio"
SWAP_USAGE = "MaximumAllowedSwapUsage"
SCALE_DOWN = "ScaleDown"
HIGH_VM_COUNT = "HighVmCount"
MIGRATION_THRESHOLD = "MigrationThreshold"
MOST_FREE = "MaxFreeMemoryForOverUtilized"
LEAST_FREE = "MinFreeMemoryForUnderUtilized"
IN_RESERVE = "HostsInReserve"
POWER_MANAGED = "EnableAutomaticHostPowerManagement"

MOST_MIB = 1 << 30
"""A petabyte."""

_PARAMETERS = (
    PolicyParameter(
        name=HIGH_UTILIZATION, low=50, high=99, default=80, unit="%",
        description="CPU load from which a host counts as busy (default: VOLERY_SCHEDULER_HIGH_UTILIZATION_PERCENT)",
    ),
    PolicyParameter(
        name=LOW_UTILIZATION, low=0, high=49, default=20, unit="%",
        description="CPU load below which a host is so idle that its VMs had better run elsewhere",
    ),
    PolicyParameter(
        name=OVERLOAD_MINUTES, low=0, high=1440, default=0, unit="minutes", whole=False,
        description="how long a host must have been busy before that counts; 0: the filter cpu_overload excludes nobody "
                    "(default: VOLERY_SCHEDULER_OVERLOAD_SECONDS)",
    ),
    PolicyParameter(
        name=VCPU_RATIO, low=0, high=2.99, default=0, unit="vCPUs per thread", whole=False,
        description="a host that would have promised so many vCPUs per thread is the worst choice; 0: none is",
    ),
    PolicyParameter(
        name=SWAP_USAGE, low=0, high=199, default=0, unit="%",
        description="how much of its memory a host may have swapped out beyond what it could take back "
                    "(default: VOLERY_SCHEDULER_SWAP_PERCENT)",
    ),
    PolicyParameter(
        name=SCALE_DOWN, low=1, high=100, default=1,
        description="by what the weight of highly available VMs is divided",
    ),
    PolicyParameter(
        name=HIGH_VM_COUNT, low=1, high=10_000, default=10, unit="VMs",
        description="a host with fewer VMs never has too many",
    ),
    PolicyParameter(
        name=MIGRATION_THRESHOLD, low=2, high=10_000, default=5, unit="VMs",
        description="by how many VMs two hosts must differ before one has too many",
    ),
    PolicyParameter(
        name=MOST_FREE, low=0, high=MOST_MIB, default=0, unit="MiB",
        description="a host with less memory left has too much; 0: memory doesn't count",
    ),
    PolicyParameter(
        name=LEAST_FREE, low=0, high=MOST_MIB, default=0, unit="MiB",
        description="only a host with more memory left has room for others' VMs; 0: memory doesn't count",
    ),
    PolicyParameter(
        name=IN_RESERVE, low=0, high=10_000, default=0, unit="hosts",
        description="so many empty hosts stay up when hosts are switched off to save power",
    ),
    PolicyParameter(
        name=POWER_MANAGED, low=0, high=1, default=0,
        description="1: the scheduler switches hosts off that aren't needed, and on again, by their power management",
    ),
)  # fmt: skip
PARAMETERS = {parameter.name: parameter for parameter in _PARAMETERS}

_STARTS = "a VM that is placed without it can't be started there"
_GUARD = "a claim beyond it would be refused when it is written, whatever the policy"
_PROMISE = "an enforcing rule of an affinity group promises that no placement breaks it"


def _unit(
    kind: UnitKind, name: str, description: str, *uses: str, ovirt: str = "", mandatory: str = ""
) -> PolicyUnit:
    used = tuple(PARAMETERS[each] for each in uses)
    return PolicyUnit(
        name=name,
        kind=kind,
        description=description,
        ovirt_name=ovirt,
        mandatory=mandatory,
        parameters=used,
    )


F, W, B = UnitKind.FILTER, UnitKind.WEIGHT, UnitKind.BALANCE
UNITS: tuple[PolicyUnit, ...] = (
    _unit(F, "cluster", "isn't of the VM's cluster", mandatory="networks, storage and limits are the cluster's"),
    _unit(F, "target", "isn't the host that was asked for", mandatory="whoever asks for one host gets no other"),
    _unit(F, "host_state", "isn't up", mandatory=_STARTS),
    _unit(F, "pinned", "isn't among the hosts that the VM is pinned to", ovirt="PinToHost",
          mandatory="the VM's own pins promise it"),
    _unit(F, "excluded", "is the source of the migration, or was tried before", ovirt="Migration",
          mandatory="a VM doesn't migrate to where it is"),
    _unit(F, "cpu", "has fewer threads than the VM has vCPUs", ovirt="CPU"),
    _unit(F, "cpu_overcommit", "has promised too many vCPUs", mandatory=_GUARD),
    _unit(F, "cpu_pinning", "hasn't the physical CPUs that the VM wants, or would have too few left for VMs that share them",
          ovirt="CpuPinning", mandatory=_GUARD),
    _unit(F, "memory", "has too little memory left", ovirt="Memory", mandatory=_GUARD),
    _unit(F, "huge_pages", "has too few huge pages left", ovirt="HugePages", mandatory=_GUARD),
    _unit(F, "numa", "lacks a NUMA cell that a node of the VM is pinned to, or room in it", ovirt="NUMA",
          mandatory=_GUARD),
    _unit(F, "host_devices", "lacks a device that the VM asks for, or another VM or the host itself has it",
          ovirt="HostDevice", mandatory=_GUARD),
    _unit(F, "network", "lacks a network of the VM", ovirt="Network", mandatory=_STARTS),
    _unit(F, "storage", "doesn't reach the storage of the VM's disks", mandatory=_STARTS),
    _unit(F, "cpu_model", "can't give the CPU model", ovirt="CPU-Level", mandatory=_STARTS),
    _unit(F, "machine", "can't give the machine type", ovirt="Emulated-Machine", mandatory=_STARTS),
    _unit(F, "affinity_vms", "would break an enforcing rule between VMs", ovirt="VmAffinityGroups",
          mandatory=_PROMISE),
    _unit(F, "affinity_hosts", "would break an enforcing rule between VMs and hosts", ovirt="VmToHostsAffinityGroups",
          mandatory=_PROMISE),
    _unit(F, "cluster_maintenance", "is there at all, when a VM starts that isn't highly available", ovirt="ClusterInMaintenance"),
    _unit(F, "cpu_overload", "has been busy for too long; never excludes a restart", HIGH_UTILIZATION, OVERLOAD_MINUTES,
          ovirt="CPUOverloaded"),
    _unit(F, "swap", "swaps too much", SWAP_USAGE, ovirt="Swap"),
    _unit(W, "cpu_even", "the less loaded, the better", VCPU_RATIO, ovirt="OptimalForCpuEvenDistribution"),
    _unit(W, "memory_even", "the more memory is left, the better", ovirt="OptimalForMemoryEvenDistribution"),
    _unit(W, "cpu_saving", "the busier, the better, but not beyond the high utilisation", HIGH_UTILIZATION,
          ovirt="OptimalForCpuPowerSaving"),
    _unit(W, "memory_saving", "the fuller, the better", ovirt="OptimalForMemoryPowerSaving"),
    _unit(W, "guests_even", "the fewer VMs, the better", ovirt="OptimalForEvenGuestDistribution"),
    _unit(W, "fragmentation", "the less room is lost that has memory and vCPUs in the cluster's proportions, the better"),
    _unit(W, "preferred_hosts", "hosts that the VM prefers", ovirt="PreferredHosts"),
    _unit(W, "ha_reservation", "the fewer highly available VMs, the better, for such a VM in a cluster with a reserve",
          SCALE_DOWN, ovirt="OptimalForHaReservation"),
    _unit(W, "affinity_vms_wish", "wishes of affinity groups about other VMs", ovirt="VmAffinityGroups"),
    _unit(W, "affinity_hosts_wish", "wishes of affinity groups about hosts", ovirt="VmToHostsAffinityGroups"),
    _unit(W, "affinity_room", "room for all VMs that must be with this one"),
    _unit(W, "numa_match", "the more of the VM's NUMA nodes fit into one cell, the better", ovirt="CpuAndNumaPinning"),
    _unit(W, "cpus_together", "of a VM with CPUs of its own: the fewer NUMA cells have enough of them free, the better"),
    _unit(B, "none", "no host has too much", ovirt="None"),
    _unit(B, "even_distribution", "hosts whose CPUs are busy or whose memory runs short have too much", HIGH_UTILIZATION,
          OVERLOAD_MINUTES, MOST_FREE, LEAST_FREE, ovirt="OptimalForEvenDistribution"),
    _unit(B, "power_saving", "as even_distribution, and hosts that do little should be emptied", HIGH_UTILIZATION,
          LOW_UTILIZATION, OVERLOAD_MINUTES, MOST_FREE, LEAST_FREE, IN_RESERVE, POWER_MANAGED, ovirt="OptimalForPowerSaving"),
    _unit(B, "even_guest_distribution", "hosts with many more VMs than another have too many", HIGH_VM_COUNT,
          MIGRATION_THRESHOLD, ovirt="OptimalForEvenGuestDistribution"),
    _unit(B, "even_overall_distribution", "hosts have too much as by even_distribution or by even_guest_distribution",
          HIGH_UTILIZATION, OVERLOAD_MINUTES, MOST_FREE, LEAST_FREE, HIGH_VM_COUNT, MIGRATION_THRESHOLD),
)  # fmt: skip
"""In the order in which filters are told. Of a filter, `description` says which hosts it excludes."""

BY_KIND = {kind: {unit.name: unit for unit in UNITS if unit.kind is kind} for kind in UnitKind}
MANDATORY = tuple(name for name, unit in BY_KIND[F].items() if unit.mandatory)
OPTIONAL = tuple(name for name in BY_KIND[F] if name not in MANDATORY)
