"""One decision: filters and weights applied to the whole fleet at once, and its explanation per host and rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Floats, Ints
from services.scheduler.policies import resized
from services.scheduler.policies.filters import FILTERS, Filter
from services.scheduler.policies.remedies import remedies
from services.scheduler.policies.request import Request
from services.scheduler.policies.weights import weigh
from volery.contracts.scheduling import HostVerdict, Remedy, Room, Verdict

NAMED_HOSTS = 5
"""Hosts that a refusal's sentence names; of the others it says how many each rule excludes."""
NAMED_WEIGHTS = 3
"""Weights that a choice's sentence compares with the runner-up's."""


@dataclass(frozen=True)
class Decision:
    """What every rule said of every host. Sorted is only what is asked for: of ten thousand hosts that fit, few are."""

    considered: Bools
    """Hosts of its cluster, and the one that was asked for."""
    target: Bools
    fits: Bools
    masks: dict[str, Bools]
    everyone: Bools
    """The very mask of a rule that excludes no host."""
    total: Floats
    """Rounded to what counts as equal."""
    scores: dict[str, Floats]
    ranks: Ints
    """What decides between equals."""

    @cached_property
    def excluding(self) -> dict[str, Bools]:
        """The masks of rules that may exclude a host. Most can't: a rule that isn't about this VM isn't counted over all
        hosts."""
        return {rule: mask for rule, mask in self.masks.items() if mask is not self.everyone}

    @cached_property
    def level(self) -> Ints:
        """0 where it fits; else the more, the more stands against it. (Where a host was asked for, no other fits.)"""
        against = np.sum([~mask for mask in self.excluding.values()], axis=0)
        found: Ints = np.where(self.fits, 0, 1 + against + ~self.target * (len(self.masks) + 1))
        return found

    @cached_property
    def order(self) -> Ints:
        """Rows of the hosts that were considered, best first: of those that don't fit, the one with the fewest rules
        against it."""
        return self._sorted(np.flatnonzero(self.considered), self.level)

    def first(self, count: int) -> Ints:
        """The first so many of the order."""
        rows = np.flatnonzero(self.considered & self.fits)
        if len(rows) >= count:
            return self._sorted(_highest(rows, self.total, count))[:count]
        rows = np.flatnonzero(self.considered)
        lowest = self.total.min(initial=0.0)
        part = (self.total - lowest) / (
            self.total.max(initial=0.0) - lowest + 1
        )  # below 1: between two levels
        return self._sorted(_highest(rows, part - self.level, count), self.level)[:count]

    def _sorted(self, rows: Ints, *before: Ints) -> Ints:
        keys = (self.ranks[rows], -self.total[rows], *(key[rows] for key in before))
        ordered: Ints = rows[np.lexsort(keys)]
        return ordered

    @cached_property
    def named(self) -> Ints:
        """Those that a sentence names."""
        return self.first(NAMED_HOSTS)

    @cached_property
    def best(self) -> int | None:
        return int(self.named[0]) if self.fitting else None

    @cached_property
    def fitting(self) -> int:
        return int(np.count_nonzero(self.considered & self.fits))

    def excluded_by(self) -> dict[str, int]:
        """Rule → how many of the hosts it excludes."""
        hosts = int(np.count_nonzero(self.considered))
        left = {rule: int(np.count_nonzero(self.considered & mask)) for rule, mask in self.excluding.items()}
        return {rule: hosts - count for rule, count in left.items() if count < hosts}


BLOCK = 64
"""Hosts of which the best is looked at first, where only the best few of thousands are wanted."""


def _highest(rows: Ints, values: Floats, count: int) -> Ints:
    """Of these rows at least so many with the highest values, and whoever is as good as the last of them."""
    blocks = len(rows) // BLOCK
    if blocks < count:
        return rows
    found = values[rows]
    best = found[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
    near: Ints = rows[found >= np.partition(best, blocks - count)[blocks - count]]
    return near


def decide(fleet: Fleet, request: Request) -> Decision:
    masks = _masks(fleet, request)
    fits = _all_of(fleet, masks)
    scores = weigh(fleet, request, fits)
    total = np.zeros(len(fleet))
    for score in scores.values():
        if score is not fleet.nothing:
            total += score
    total = total.round(9)
    wanted = request.place.target_host_id
    target = fleet.among((wanted,)) if wanted else ~fleet.everyone
    considered = masks["cluster"] | target
    return Decision(considered, target, fits, masks, fleet.everyone, total, scores, fleet.ranks())


def _all_of(fleet: Fleet, masks: Mapping[str, Bools]) -> Bools:
    """Hosts that pass all of them. One after the other in place: a table of all masks would be copied together first."""
    fits = fleet.everyone.copy()
    for mask in masks.values():
        if mask is not fleet.everyone:
            fits &= mask
    return fits


def _masks(fleet: Fleet, request: Request) -> dict[str, Bools]:
    """Of the filters that its policy has."""
    return {f.name: f.mask(fleet, request) for f in FILTERS if request.follows(f.name)}


LASTING = ("cluster", "target", "pinned", "excluded", "cpu", "cpu_model", "machine", "cluster_maintenance")
"""Filters whose answer doesn't change by what happens to other VMs, or to the state of hosts, networks and storage."""


def possible(fleet: Fleet, request: Request, decision: Decision) -> Bools:
    """Hosts that could take the VM if they had no other, and all else were well."""
    lasting = [decision.masks[name] for name in LASTING if name in decision.masks]
    roomy = request.memory <= fleet.ints("memory_limit")
    roomy &= resized.vcpus(fleet, request) <= fleet.ints("vcpus_limit")
    found: Bools = np.logical_and.reduce([*lasting, roomy])
    return found


def hopeless(fleet: Fleet, request: Request, decision: Decision) -> bool:
    """There are hosts that are up, and none of the cluster's could take the VM even if it had no other."""
    up = decision.considered & decision.masks["host_state"]
    return bool(up.any()) and not possible(fleet, request, decision).any()


def mend(fleet: Fleet, request: Request, decision: Decision) -> tuple[Remedy, ...]:
    """The smallest changes that would let it fit, when it doesn't."""
    if decision.best is not None:
        return ()
    return remedies(fleet, request, decision.masks, np.flatnonzero(decision.considered))


def explain(
    fleet: Fleet, request: Request, decision: Decision, most: int | None = None
) -> tuple[HostVerdict, ...]:
    """Host by host, the best first, no more than `most`."""
    rows = _shown(decision, most)
    fits = decision.fits[rows]
    chosen, refused = rows[fits], rows[~fits]
    weights = dict(zip(chosen.tolist(), _weights(decision, chosen), strict=True))
    rules = dict(zip(refused.tolist(), _against(decision.masks, refused), strict=True))
    return tuple(
        _fitting(fleet, decision, row, weights[row])
        if row in weights
        else _excluded(fleet, request, row, rules[row])
        for row in rows.tolist()
    )


def _shown(decision: Decision, most: int | None) -> Ints:
    if most == NAMED_HOSTS:
        return decision.named
    return decision.order if most is None else decision.first(most)


def _weights(decision: Decision, rows: Ints) -> list[dict[str, float]]:
    """Weight → its share of the sum, of each of these rows."""
    table = np.array([score[rows] for score in decision.scores.values()]).round(4)
    return [dict(zip(decision.scores, shares, strict=True)) for shares in table.T.tolist()]


def _against(masks: Mapping[str, Bools], rows: Ints) -> list[list[Filter]]:
    """The rules that exclude each of these rows."""
    found: list[list[Filter]] = [[] for _ in rows]
    for rule in FILTERS if len(rows) else ():
        if (mask := masks.get(rule.name)) is not None:
            for at in np.flatnonzero(~mask[rows]).tolist():
                found[at].append(rule)
    return found


def _fitting(fleet: Fleet, decision: Decision, row: int, weights: dict[str, float]) -> HostVerdict:
    weight = round(float(decision.total[row]), 4)
    return HostVerdict(
        host_id=fleet.ids[row], name=fleet.names[row], fits=True, weight=weight, weights=weights
    )


def _excluded(fleet: Fleet, request: Request, row: int, rules: Sequence[Filter]) -> HostVerdict:
    verdicts = []
    for rule in rules:
        message, change = rule.explain(fleet, request, row)
        verdicts.append(Verdict(rule=rule.name, passed=False, message=message, change=change))
    return HostVerdict(host_id=fleet.ids[row], name=fleet.names[row], verdicts=tuple(verdicts))


def room(fleet: Fleet, request: Request) -> Room:
    """How many hosts would take the VM, and which of the others would have to change least: the fewest rules against
    it, one that is up before one that isn't. Explains only that one, so that many VMs can be asked about."""
    masks = _masks(fleet, request)
    fits = _all_of(fleet, masks)
    hosts = np.flatnonzero(masks["cluster"] & masks["excluded"])
    against = np.sum([~mask for mask in masks.values()], axis=0)
    others = [int(row) for row in hosts if not fits[row]]
    up = masks["host_state"]
    nearest = min(others, key=lambda r: (int(against[r]), not up[r], fleet.ids[r]), default=None)
    rules = [] if nearest is None else _against(masks, np.array([nearest]))[0]
    mended = () if fits[hosts].any() else remedies(fleet, request, masks, hosts)
    return Room(
        vm_id=request.need.vm_id,
        hosts=len(hosts),
        up=int(up[hosts].sum()),
        fitting=int(fits[hosts].sum()),
        memory_bytes=request.memory,
        nearest=None if nearest is None else _excluded(fleet, request, nearest, rules),
        remedies=mended,
    )


def sentence(
    fleet: Fleet, request: Request, decision: Decision, hosts: Sequence[HostVerdict], mended: Sequence[Remedy]
) -> str:
    """The decision for a person: the host and why it, or the hosts with their reasons and what would mend that."""
    target = request.place.target_host_id
    if target and target not in fleet.rows:
        return f"no host can take {request.vm}: there is no host {target}; list hosts to see what exists"
    if decision.best is not None:
        return (
            f"{request.vm} is placed on {hosts[0].name}{_why(hosts, decision.fitting)}, of "
            f"{np.count_nonzero(decision.considered)} in {request.cluster}{_by(request)}"
        )
    if not decision.considered.any():
        return (
            f"no host can take {request.vm}: {request.cluster} has no hosts; add one, or move the VM to a "
            "cluster that has"
        )
    named = "; ".join(
        f"{host.name}: {', '.join(v.message for v in _telling(host))}" for host in hosts[:NAMED_HOSTS]
    )
    help_ = f". What would help: {'; or '.join(r.sentence for r in mended)}" if mended else ""
    return (
        f"no host of {request.cluster} can take {request.vm}{_by(request)}. {named}{_others(decision)}{help_}"
    )


def _by(request: Request) -> str:
    """An administrator's policy is named; a built-in one goes without saying."""
    recipe = request.recipe
    return "" if recipe.built_in else f" by scheduling policy {recipe.name} (revision {recipe.revision})"


def _why(hosts: Sequence[HostVerdict], fitting: int) -> str:
    if fitting == 1:
        return ", the only one that fits"
    best, second = hosts[0], hosts[1]
    ahead = {rule: round(share - second.weights[rule], 4) for rule, share in best.weights.items()}
    telling = sorted((rule for rule in ahead if ahead[rule]), key=lambda rule: -abs(ahead[rule]))
    parts = ", ".join(f"{rule} {ahead[rule]:+g}" for rule in telling[:NAMED_WEIGHTS])
    against = f"{best.weight:g} against {second.weight:g} of {second.name}"
    if best.weight == second.weight:
        return f", the best of {fitting} that fit ({against}: the lower id decides)"
    return f", the best of {fitting} that fit ({against}: {parts})"


def _others(decision: Decision) -> str:
    """How many of the hosts that aren't named each rule excludes."""
    others = decision.considered.copy()
    others[decision.named] = False
    rows = np.flatnonzero(others)
    if not len(rows):
        return ""
    against = {rule: ~mask[rows] for rule, mask in decision.excluding.items()}
    if "target" in against:
        against["target"] &= np.sum(list(against.values()), axis=0) == 1
    counts = sorted(((int(a.sum()), rule) for rule, a in against.items() if a.any()), key=lambda c: -c[0])
    rules = ", ".join(f"{rule} {count}" for count, rule in counts)
    return f"; {len(rows)} more were excluded by: {rules}"


def _telling(host: HostVerdict) -> Sequence[Verdict]:
    """That another host was asked for says nothing when there are other reasons."""
    return [v for v in host.verdicts if v.rule != "target"] or host.verdicts
