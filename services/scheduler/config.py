"""Settings of the scheduler: VOLERY_SCHEDULER_*."""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_SCHEDULER_."""

    host_reserve_mib: int = 256
    """Memory of every host that no VM may have: kernel, libvirtd, agent (oVirt's host_mem_reserve)."""
    guest_overhead_mib: int = 65
    """What QEMU needs beside the guest's memory (oVirt's guest overhead). Part of every claim."""
    claim_seconds: float = 300.0
    """A tentative claim that nobody confirmed is given back after this long, unless its VM is on its way."""
    settled_seconds: float = 5.0
    """How long a VM's state must have been unchanged before a claim that contradicts it is given back: facts
    travel for milliseconds, and a claim released too early could be given twice."""
    refusal_wait_seconds: float = 0.02
    """How long a placement that finds no host waits for facts on their way before it says so. Who starts or moves a VM asks
    once more a quarter of a second later."""
    decision_days: int = 7
    """How long decisions stay readable."""
    explained_hosts: int = 100
    """Hosts explained in a refusal and in a dry run, at least 5; of the others it is said how many each rule excludes. A
    placement keeps the five best, which say why it was this one."""
    high_utilization_percent: float = 80.0
    """Power saving fills a host up to this CPU load, not further (oVirt's HighUtilization)."""
    overload_seconds: float = 0.0
    """A host whose CPU load has been at high_utilization_percent or above for so long gets no further VM, except one that
    is restarted after its end (oVirt's CpuOverCommitDurationMinutes, 120 there). 0: it may; weights alone decide."""
    swap_percent: float = 0.0
    """A host that has swapped out more than it could take back, by more than this share of its memory, gets no further
    VM (oVirt's MaximumAllowedSwapUsage)."""
    vcpu_load_percent: float = 10.0
    """Assumed load of a vCPU that was placed after the host's last sample (oVirt's VcpuConsumptionPercentage)."""
    plan_seconds: float = 60.0
    """How often the leader looks whether a cluster needs a plan: a broken affinity group, or a host with too much by the
    balance of the cluster's scheduling policy (oVirt's VdsLoadBalancingIntervalInMinutes, 1 there). 0: it makes none by
    itself."""
    plan_after_seconds: float = 120.0
    """How long a host must have been busy before the scheduler moves VMs away from it by itself, where the policy doesn't
    say (oVirt's CpuOverCommitDurationMinutes, 2 there)."""
    plan_moves: int = 20
    """Moves of a balance that the scheduler begins by itself; it looks again a minute later."""
    plan_pause_seconds: float = 300.0
    """After a plan that was stopped, the scheduler leaves its cluster alone for so long."""
    saving_seconds: float = 60.0
    """How often the leader looks whether hosts of a cluster whose policy says so may be switched off, or must be woken. 0:
    never."""
    saving_heard_seconds: float = 120.0
    """Power is saved only where every host that is up gave a sample within this: eight of its intervals."""
    saving_pause_seconds: float = 900.0
    """After a host was switched off or woken, none of its cluster is for so long, but for a VM that found no place: a server
    takes minutes to start, and a cluster that needs one now may need it again soon."""
    licence_days: int = 1827
    """How long it can be asked which VM held which physical CPUs, after it gave them back: five years."""
    plan_days: int = 30
    """How long plans that ended stay readable."""
