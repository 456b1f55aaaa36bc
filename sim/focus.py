"""What a seed's scenes are made of: everything, or only what may meet one kind of mistake."""

from __future__ import annotations

from dataclasses import dataclass

from sim import doubts, faults, losses, midway, overtaken, people, promises
from sim.faults import Fault

Weighed = tuple[tuple[Fault, float], ...]

FAULTS: Weighed = (
    (faults.power_lost, 3.0),
    (faults.host_frozen, 3.0),
    (faults.network_cut, 3.0),
    (faults.slow_network, 0.7),
    (faults.agent_killed, 2.0),
    (faults.agent_paused, 1.5),
    (faults.journal_lost, 0.4),
    (faults.libvirt_killed, 2.0),
    (faults.vm_crashed, 3.0),
    (faults.guest_powers_off, 1.0),
    (faults.service_killed, 3.0),
    (faults.service_paused, 2.0),
    (faults.nats_gone, 1.0),
    (faults.postgres_gone, 1.0),
    (faults.both_gone, 0.4),
    (faults.bmc_troubled, 1.5),
    (faults.leader_killed_in_mid_fence, 1.5),
    (faults.clock_jumped, 1.0),
    (faults.many_lose_power, 0.5),
    (faults.many_are_cut, 0.5),
    (midway.migration_cut, 2.0),
    (midway.struck_between_steps, 3.0),
    (midway.postgres_restored, 0.5),
    (midway.orders_come_again, 0.5),
)
"""With how often they are chosen."""

REQUESTS: Weighed = (
    (people.stop, 2.0),
    (people.start, 3.0),
    (people.restart, 1.0),
    (people.migrate, 5.0),
    (people.maintain, 1.0),
    (people.confirm, 1.5),
)


@dataclass(frozen=True)
class Focus:
    """`scenes` 0: as many as an hour and ten faults need."""

    faults: Weighed
    requests: Weighed
    scenes: int = 0
    hosts: int = 0
    """0: 3 to 30, mostly few."""
    vms_per_host: tuple[float, float] = (0.8, 1.6)
    highly_available: float = 0.7
    """The share of the VMs."""
    faults_at_once: tuple[int, ...] = (5, 5, 5, 6, 6)
    requests_at_once: tuple[int, ...] = (0, 1, 2, 3)
    harmless: bool = False
    """Nothing of it is a reason to switch a host off, or to believe that it is dead."""
    peers: bool = False
    """Hosts try the silent ones. No judgement follows from it, so the other scenes do without its traffic."""


def _only(*chosen: Fault) -> Weighed:
    return tuple((each, 1.0) for each in chosen)


def _promised(fault: Fault, *, harmless: bool = False, hosts: int = 3) -> Focus:
    """One trouble, in calm."""
    return Focus(
        _only(fault),
        (),
        scenes=1,
        hosts=hosts,
        highly_available=1.0,
        faults_at_once=(1,),
        harmless=harmless,
    )


PROMISES: dict[str, Focus] = {
    "dead": _promised(promises.dies_for_good),
    "hung": _promised(promises.hangs_for_good),
    "looked at": _promised(promises.is_looked_at),
    "booted": _promised(promises.boots_again),
    "silent": _promised(promises.is_silent),
    "set back": _promised(promises.clock_set_back),
    "answers": _promised(promises.answers_are_lost),
    "start overtaken": _promised(overtaken.start_overtaken),
    "stop overtaken": _promised(overtaken.stop_overtaken),
    "move overtaken": _promised(overtaken.move_overtaken),
    "former boot": _promised(overtaken.start_of_a_former_boot),
    "former boot's journal": _promised(overtaken.start_of_a_former_boot_journaled),
    "fence overtaken": _promised(overtaken.fence_overtaken),
    "BMC reset": _promised(doubts.bmc_is_reset, harmless=True),
    "most cut": _promised(doubts.most_are_cut, harmless=True, hosts=4),
    "one after another": _promised(doubts.hang_one_after_another, hosts=6),
    "fact lost": _promised(losses.fact_is_lost),
    "stream lost": _promised(losses.stream_is_lost),
    "dies in the middle": _promised(losses.dies_in_the_middle),
    "new disk": _promised(losses.comes_back_with_a_new_disk),
    "without libvirtd": _promised(losses.boots_without_libvirt),
    "moved since": _promised(losses.moved_since_the_backup),
    "started since": _promised(losses.started_since_the_backup),
    "everywhere since": _promised(losses.everywhere_since_the_backup),
    "made anew": _promised(losses.made_anew_since_the_backup),
    "asked anew": _promised(losses.asked_for_when_made_anew),
    "clocks forward": _promised(doubts.clocks_go_forward, harmless=True),
    "leader pauses": _promised(doubts.leader_stands_still, harmless=True),
    "leader cut off": _promised(doubts.leader_hears_nothing, harmless=True),
    "wrong machine": _promised(doubts.confirmed_by_mistake),
    "has left": _promised(losses.source_dies_after_the_move),
    "no arrival": _promised(losses.destination_ends),
    "silent stop": _promised(losses.stop_of_a_silent_host),
    "moments": _promised(promises.stands_still_for_a_moment, harmless=True),
}
FOCUSES: dict[str, Focus] = {
    **PROMISES,
    "": Focus(FAULTS, REQUESTS),
    "fences": Focus(
        _only(
            faults.host_frozen,
            faults.network_cut,
            faults.bmc_troubled,
            faults.leader_killed_in_mid_fence,
            faults.power_lost,
        ),
        (),
        scenes=2,
        hosts=4,
        highly_available=1.0,
    ),
    "peers": Focus(
        _only(
            faults.host_frozen,
            faults.network_cut,
            faults.power_lost,
            faults.agent_killed,
            faults.service_killed,
        ),
        (),
        scenes=2,
        hosts=4,
        highly_available=1.0,
        peers=True,
    ),
    "reboots": Focus(
        _only(faults.power_lost, faults.agent_killed, faults.journal_lost, midway.struck_between_steps),
        _only(people.stop, people.start, people.restart, people.migrate),
        scenes=2,
        hosts=3,
    ),
    "late": Focus(
        _only(midway.orders_come_again),
        _only(people.stop, people.restart, people.migrate),
        scenes=2,
        hosts=3,
        faults_at_once=(1,),
        requests_at_once=(4, 5, 6),
    ),
    "migrations": Focus(_only(midway.migration_cut), _only(people.migrate), scenes=2, hosts=3),
    "steps": Focus(
        _only(midway.struck_between_steps),
        _only(people.stop, people.start, people.restart),
        scenes=2,
        hosts=3,
        highly_available=0.3,
    ),
    "bus": Focus(
        _only(faults.nats_gone, faults.service_killed, faults.network_cut, faults.vm_crashed),
        _only(people.stop, people.start, people.migrate),
        scenes=2,
        hosts=3,
    ),
    "services": Focus(
        _only(faults.service_killed, faults.service_paused, faults.postgres_gone, faults.vm_crashed),
        _only(people.stop, people.start, people.restart, people.migrate),
        scenes=2,
        hosts=3,
        requests_at_once=(2, 3, 4),
    ),
    "many": Focus(
        _only(faults.many_lose_power, faults.many_are_cut, faults.host_frozen, faults.service_killed),
        (),
        scenes=2,
        hosts=6,
        highly_available=1.0,
        faults_at_once=(2, 3),
    ),
    "clocks": Focus(
        _only(faults.clock_jumped, faults.host_frozen, faults.network_cut, faults.vm_crashed),
        _only(people.start, people.stop),
        scenes=2,
        hosts=4,
        highly_available=1.0,
    ),
    "crashes": Focus(
        _only(faults.vm_crashed, faults.guest_powers_off, faults.agent_killed, faults.libvirt_killed),
        _only(people.stop, people.start),
        scenes=2,
        hosts=3,
        highly_available=0.8,
    ),
    "people": Focus(
        _only(faults.power_lost, faults.network_cut, faults.agent_paused),
        _only(people.confirm, people.maintain),
        scenes=2,
        hosts=4,
        requests_at_once=(1, 2),
    ),
    "pauses": Focus(
        _only(faults.paused_again_and_again),
        (),
        scenes=1,
        hosts=24,
        vms_per_host=(0.3, 0.5),
        highly_available=1.0,
        faults_at_once=(1,),
        harmless=True,
    ),
    "servers": Focus(
        _only(faults.servers_gone_for_an_hour),
        (),
        scenes=1,
        hosts=3,
        highly_available=1.0,
        faults_at_once=(1,),
        harmless=True,
    ),
    "restores": Focus(
        _only(midway.postgres_restored, faults.vm_crashed, faults.power_lost, faults.network_cut),
        _only(people.start, people.stop, people.migrate, people.restart),
        scenes=2,
        hosts=3,
    ),
}
