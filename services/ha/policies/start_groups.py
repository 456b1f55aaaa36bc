"""Start groups: what order makes sense, and who still waits for whom. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from volery.contracts.errors import conflict, invalid
from volery.contracts.start_group import StartGroup, WaitFor
from volery.contracts.vm import DesiredState, VmStatus

LONGEST_SECONDS = 600.0
"""A VM that can't be brought back keeps those after it down no longer than this."""
RUNS = frozenset({VmStatus.UP, VmStatus.POWERING_UP, VmStatus.REBOOT_IN_PROGRESS, VmStatus.PAUSED})


@dataclass(frozen=True, slots=True)
class Member:
    """A VM as inventory last said."""

    name: str
    status: str
    desired: str
    enabled: bool
    """Highly available, or brought back after a blackout."""
    agent: bool
    """Its guest agent answers."""
    brought_back: bool = False
    """ha has brought it back within the last hour."""
    gave_up: bool = False
    host_id: str = ""
    """Where it runs, or ran last."""


def check(group: StartGroup, others: Sequence[StartGroup]) -> None:
    """Raises Refused for a group that can't be, or whose order closes a circle. `others` are those of its cluster."""
    if not 0 <= group.wait_seconds <= LONGEST_SECONDS:
        raise invalid(
            f"later groups wait 0 to {LONGEST_SECONDS:g} s for start group {group.name}, not {group.wait_seconds:g}",
            field="wait_seconds",
        )
    for field, ids in (("vm_ids", group.vm_ids), ("after", group.after)):
        if len(set(ids)) != len(ids):
            raise invalid(f"start group {group.name} names one of its {field} twice", field=field)
    known = {g.id: g for g in others} | {group.id: group}
    for group_id in group.after:
        if group_id not in known:
            raise invalid(
                f"start group {group.name} can't come after {group_id}: its cluster has no such start group",
                field="after",
            )
    if circle := circle_of(group, known):
        names = " → ".join(known[group_id].name for group_id in circle)
        raise conflict(
            f"start group {group.name} would wait for itself: {names}. Take one of them out of the `after` of the next",
            rule="circle",
            groups=list(circle),
        )


def circle_of(group: StartGroup, known: Mapping[str, StartGroup]) -> tuple[str, ...]:
    """The shortest way from a group through those before it back to itself; empty when there is none."""
    ways: list[tuple[str, ...]] = [(group.id,)]
    seen: set[str] = set()
    for way in ways:
        for before in known[way[-1]].after if way[-1] in known else ():
            if before == group.id:
                return (*way, before)
            if before not in seen:
                seen.add(before)
                ways.append((*way, before))
    return ()


def before(vm_id: str, groups: Mapping[str, StartGroup]) -> list[StartGroup]:
    """Every group that comes before this VM's, however far; one whose VMs need nothing lets those before it count."""
    mine = {group.id for group in groups.values() if vm_id in group.vm_ids}
    found: set[str] = set()
    open_ = [group_id for own in mine for group_id in groups[own].after]
    while open_:
        group_id = open_.pop()
        if group_id in groups and group_id not in found:
            found.add(group_id)
            open_ += groups[group_id].after
    return [groups[group_id] for group_id in sorted(found - mine)]


def waits_for(
    vm_id: str,
    groups: Mapping[str, StartGroup],
    members: Mapping[str, Member],
    waited: float,
    silent: Collection[str] = (),
) -> str:
    """Which group a VM that is to be brought back waits for, as a sentence; "" when it is its turn. `waited` seconds
    have passed since it could have been. What is said to run on a `silent` host may not run any more."""
    for group in before(vm_id, groups):
        if waited >= group.wait_seconds:
            continue
        for member_id in group.vm_ids:
            member = members.get(member_id)
            if member_id != vm_id and member is not None and _is_awaited(group.wait_for, member, silent):
                return (
                    f"it waits for VM {member.name} of start group {group.name} ({group.wait_for}), at most "
                    f"{group.wait_seconds:g} s"
                )
    return ""


def _is_awaited(wait_for: WaitFor, member: Member, silent: Collection[str]) -> bool:
    """Whether ha brings it back and it has not come as far as others wait for. What has run all along is not awaited:
    its agent may never have answered."""
    if not member.enabled or member.desired != DesiredState.UP or member.gave_up:
        return False
    if member.status not in RUNS or member.host_id in silent:
        return True
    if wait_for is WaitFor.TIME:
        return member.brought_back
    return wait_for is WaitFor.GUEST_AGENT and member.brought_back and not member.agent
