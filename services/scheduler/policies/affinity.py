"""Affinity groups: who must be with whom, who must not, and which groups contradict each other. Pure.

Enforcing positive groups that share a VM are one *union*: all its VMs run on one host. So rules reach further than the
groups of one VM: what holds for a VM holds for its whole union.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from volery.contracts.affinity_group import AffinityGroup, AffinityRule

POSITIVE, NEGATIVE = AffinityRule.POSITIVE, AffinityRule.NEGATIVE


@dataclass(frozen=True, slots=True)
class Group:
    """A group as the rules see it."""

    id: str
    name: str
    priority: float
    vm_rule: AffinityRule
    vm_enforcing: bool
    host_rule: AffinityRule
    host_enforcing: bool
    vms: frozenset[str]
    hosts: frozenset[str]

    @staticmethod
    def of(group: AffinityGroup) -> Group:
        return Group(
            group.id,
            group.name,
            group.priority,
            group.vm_rule,
            group.vm_enforcing,
            group.host_rule,
            group.host_enforcing,
            frozenset(group.vm_ids),
            frozenset(group.host_ids),
        )

    def binds_vms(self, rule: AffinityRule, *, enforcing: bool = True) -> bool:
        return self.vm_rule is rule and self.vm_enforcing is enforcing

    def binds_hosts(self, rule: AffinityRule, *, enforcing: bool = True) -> bool:
        return self.host_rule is rule and self.host_enforcing is enforcing


@dataclass(frozen=True, slots=True)
class Around:
    """Everything that says where one VM may be. Groups in the order of their ids."""

    vm_id: str
    union: frozenset[str]
    """The VMs that are where it is, itself included."""
    rivals: Mapping[str, tuple[Group, ...]]
    """VM that must not be where it is → the groups that say so."""
    hosts: tuple[tuple[Group, str], ...]
    """Enforcing host rules, and the VM of the union that each names."""
    wishes: tuple[Group, ...]
    """Groups of the VM itself with a rule that isn't enforcing."""
    seats: tuple[str, ...]
    """Groups whose VMs' places this VM's placement depends on."""
    groups: tuple[Group, ...]
    """All that name a VM of the union or a rival."""

    @property
    def others(self) -> frozenset[str]:
        """VMs whose places matter."""
        wished = {v for g in self.wishes if g.vm_rule is not AffinityRule.DISABLED for v in g.vms}
        return (self.union | self.rivals.keys() | wished) - {self.vm_id}


@dataclass(slots=True)
class ClusterRules:
    """The groups of one cluster at one revision of them."""

    revision: int = 0
    groups: tuple[Group, ...] = ()
    _of_vm: dict[str, list[Group]] = field(init=False)
    _around: dict[str, Around] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._of_vm = {}
        for group in sorted(self.groups, key=lambda g: g.id):
            for vm_id in group.vms:
                self._of_vm.setdefault(vm_id, []).append(group)

    def around(self, vm_id: str) -> Around | None:
        """None: no group has this VM."""
        if vm_id not in self._of_vm:
            return None
        found = self._around.get(vm_id)
        if found is None:
            found = self._around[vm_id] = self._look_around(vm_id)
        return found

    def union(self, vm_id: str) -> frozenset[str]:
        """The VMs that enforcing positive groups keep together with this one, itself included."""
        found, open_ = {vm_id}, [vm_id]
        while open_:
            for group in self._of_vm.get(open_.pop(), ()):
                if group.binds_vms(POSITIVE):
                    open_ += group.vms - found
                    found |= group.vms
        return frozenset(found)

    def groups_of(self, vm_ids: Collection[str]) -> list[Group]:
        """Those that name one of these VMs, in the order of their ids."""
        found = {group.id: group for vm_id in vm_ids for group in self._of_vm.get(vm_id, ())}
        return [found[group_id] for group_id in sorted(found)]

    def way(self, first: str, last: str) -> list[tuple[Group, str]]:
        """The shortest way from one VM of a union to another: each group with the VM that it leads to."""
        ways: list[list[tuple[Group, str]]] = [[]]
        seen = {first}
        for way in ways:
            at = way[-1][1] if way else first
            if at == last:
                return way
            for group in self._of_vm.get(at, ()):
                if group.binds_vms(POSITIVE):
                    ways += [[*way, (group, vm_id)] for vm_id in sorted(group.vms - seen)]
                    seen |= group.vms
        return []

    def _look_around(self, vm_id: str) -> Around:
        union = self.union(vm_id)
        rivals: dict[str, tuple[Group, ...]] = {}
        seats: set[str] = set()
        hosts: list[tuple[Group, str]] = []
        for mate in sorted(union):
            for group in self._of_vm.get(mate, ()):
                if group.binds_vms(POSITIVE):
                    seats.add(group.id)
                elif group.binds_vms(NEGATIVE):
                    seats.add(group.id)
                    self._add_rivals(rivals, vm_id, mate, group)
                if group.binds_hosts(POSITIVE) or group.binds_hosts(NEGATIVE):
                    hosts.append((group, mate))
        wishes = tuple(g for g in self._of_vm[vm_id] if not (g.vm_enforcing and g.host_enforcing))
        all_groups = tuple(self.groups_of(union | rivals.keys()))
        return Around(vm_id, union, rivals, tuple(hosts), wishes, tuple(sorted(seats)), all_groups)

    def _add_rivals(self, rivals: dict[str, tuple[Group, ...]], vm_id: str, mate: str, group: Group) -> None:
        for other in sorted(group.vms - {mate}):
            for rival in sorted(self.union(other)):
                reasons = [group for group, _ in (*self.way(vm_id, mate), *self.way(other, rival))]
                said = distinct((*reasons, group))
                if rival not in rivals or len(said) < len(rivals[rival]):
                    rivals[rival] = said


def distinct(groups: Iterable[Group]) -> tuple[Group, ...]:
    return tuple({group.id: group for group in groups}.values())


@dataclass(frozen=True, slots=True)
class Conflict:
    """Groups that can't all be kept, whatever hosts there are; `why` names VMs by their ids in braces: {id}."""

    groups: tuple[Group, ...]
    why: str


def conflicts(groups: Sequence[Group]) -> list[Conflict]:
    """Every union that is kept apart from itself or may run on no host. More VMs apart than there are hosts are none:
    hosts may come."""
    rules = ClusterRules(0, tuple(groups))
    found: list[Conflict] = []
    seen: set[str] = set()
    for vm_id in sorted({vm_id for group in groups for vm_id in group.vms}):
        if vm_id not in seen:
            union = rules.union(vm_id)
            seen |= union
            found += _kept_apart(rules, union)
            found += _without_host(rules, union)
    return found


def _kept_apart(rules: ClusterRules, union: frozenset[str]) -> Iterable[Conflict]:
    for group in rules.groups_of(union):
        inside = sorted(group.vms & union)
        if not group.binds_vms(NEGATIVE) or len(inside) < 2:
            continue
        first, second = inside[:2]
        way = rules.way(first, second)
        chain = "".join(f", group {step.name} with VM {{{vm_id}}}" for step, vm_id in way)
        yield Conflict(
            distinct((*(step for step, _ in way), group)),
            f"VM {{{first}}} must be on one host with VM {{{second}}} and on another: VM {{{first}}} is kept "
            f"together by{chain.removeprefix(',')}; group {group.name} keeps the two apart",
        )


def _without_host(rules: ClusterRules, union: frozenset[str]) -> Iterable[Conflict]:
    """Left out one after the other as long as the rest still leaves no host: what remains is the contradiction."""
    bound = _bindings(rules, union)
    if not _leaves_none(bound):
        return
    for group in list(bound):
        rest = [g for g in bound if g is not group]
        if _leaves_none(rest):
            bound = rest
    named = [(group, min(group.vms & union)) for group in bound]
    first = named[0][1]
    links = distinct(step for _, vm_id in named for step, _ in rules.way(first, vm_id))
    rules_said = "; ".join(
        f"group {group.name} lets VM {{{vm_id}}} run on {_hosts(group)} only"
        if group.binds_hosts(POSITIVE)
        else f"group {group.name} keeps VM {{{vm_id}}} off {_hosts(group)}"
        for group, vm_id in named
    )
    together = f", and group {' and group '.join(g.name for g in links)} keeps them together" if links else ""
    yield Conflict((*links, *bound), f"no host is left for VM {{{first}}}: {rules_said}{together}")


def _leaves_none(groups: Collection[Group]) -> bool:
    """Whether these host rules together leave no host. Without a positive one there is always another host."""
    only = [group.hosts for group in groups if group.binds_hosts(POSITIVE)]
    never = frozenset[str]().union(*(group.hosts for group in groups if group.binds_hosts(NEGATIVE)))
    return bool(only) and not frozenset.intersection(*only) - never


def _hosts(group: Group) -> str:
    return f"its {len(group.hosts)} hosts" if len(group.hosts) != 1 else "its host"


MOST_SAID = 20
"""Sentences that a group says about itself."""


@dataclass(frozen=True, slots=True)
class Runs:
    """A VM that runs, and where."""

    name: str
    host_id: str


def broken(group: Group, running: Mapping[str, Runs], host_names: Mapping[str, str]) -> tuple[str, ...]:
    """How running VMs break the rules of their group, enforcing or not."""
    at: dict[str, list[str]] = {}
    for vm_id in sorted(group.vms & running.keys(), key=lambda v: (running[v].name, v)):
        at.setdefault(running[vm_id].host_id, []).append(running[vm_id].name)
    places = sorted((host_names.get(host_id, host_id), host_id, names) for host_id, names in at.items())
    said = []
    if group.vm_rule is POSITIVE and len(places) > 1:
        where = "; ".join(f"{_listed(names)} on {host}" for host, _, names in places)
        said.append(f"its VMs should run on one host and run on {len(places)}: {where}")
    if group.vm_rule is NEGATIVE:
        said += [f"{_listed(names)} run together on {host}" for host, _, names in places if len(names) > 1]
    if group.host_rule is POSITIVE:
        said += [
            f"{_listed(names)} on {host}, which is none of its hosts"
            for host, host_id, names in places
            if host_id not in group.hosts
        ]
    if group.host_rule is NEGATIVE:
        said += [
            f"{_listed(names)} on {host}, one of its hosts, which it keeps them off"
            for host, host_id, names in places
            if host_id in group.hosts
        ]
    more = len(said) - MOST_SAID
    return tuple(said) if more <= 0 else (*said[:MOST_SAID], f"and {more} more")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"VM{'s' if len(names) > 1 else ''} {shown}"


def warnings(group: Group, rules: ClusterRules, host_ids: Collection[str]) -> tuple[str, ...]:
    """What keeps some of its VMs from running at the same time, with these hosts in the cluster."""
    said = []
    if group.binds_vms(NEGATIVE):
        unions = {rules.union(vm_id) for vm_id in group.vms}
        bindings = [_bindings(rules, union) for union in unions]
        usable = set(host_ids) if not all(bindings) else _usable(bindings, host_ids)
        if len(unions) > len(usable):
            said.append(
                f"it keeps {len(unions)} VMs apart, and its cluster has {len(usable)} hosts for them: "
                f"{len(unions) - len(usable)} can't run; add hosts, or make the rule a wish"
            )
    if group.binds_hosts(POSITIVE) and group.vms and not group.hosts & frozenset(host_ids):
        said.append(
            "none of its hosts is left: its VMs can't start; add hosts to it, or disable its host rule"
        )
    return tuple(said)


def _bindings(rules: ClusterRules, union: frozenset[str]) -> list[Group]:
    return [g for g in rules.groups_of(union) if g.binds_hosts(POSITIVE) or g.binds_hosts(NEGATIVE)]


def _usable(bindings: Iterable[Sequence[Group]], host_ids: Collection[str]) -> set[str]:
    """The hosts that any of these unions may use, each with its host rules."""
    found: set[str] = set()
    for groups in bindings:
        usable = set(host_ids)
        for group in groups:
            usable = usable & group.hosts if group.binds_hosts(POSITIVE) else usable - group.hosts
        found |= usable
    return found
