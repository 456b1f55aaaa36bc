"""One decision: filters and weights applied to the whole fleet at once, and its explanation per host and rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Floats
from services.scheduler.policies.filters import FILTERS
from services.scheduler.policies.request import Request
from services.scheduler.policies.weights import POLICIES
from volery.contracts.scheduling import HostVerdict, Room, Verdict

NAMED_HOSTS = 5
"""Hosts that a refusal's sentence names; the others are in its list."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Rows of the hosts that were considered, best first, and what every rule said of them."""

    order: Sequence[int]
    fits: Bools
    masks: dict[str, Bools]
    total: Floats
    scores: dict[str, Floats]

    @property
    def best(self) -> int | None:
        return self.order[0] if self.order and self.fits[self.order[0]] else None


def decide(fleet: Fleet, request: Request) -> Decision:
    masks = {f.name: f.mask(fleet, request) for f in FILTERS}
    fits = np.logical_and.reduce(list(masks.values()))
    policy = POLICIES.get(request.policy.balance, POLICIES["none"])
    scores = {w.name: w.factor * w.score(fleet, request) for w in policy}
    total: Floats = np.sum(list(scores.values()), axis=0)
    considered = np.flatnonzero(masks["cluster"] | fleet.among((request.place.target_host_id,)))
    order = sorted(considered.tolist(), key=lambda r: (not fits[r], -round(float(total[r]), 9), fleet.ids[r]))
    return Decision(order, fits, masks, total, scores)


def explain(fleet: Fleet, request: Request, decision: Decision) -> tuple[HostVerdict, ...]:
    return tuple(_verdict(fleet, request, decision, row) for row in decision.order)


def _verdict(fleet: Fleet, request: Request, decision: Decision, row: int) -> HostVerdict:
    if decision.fits[row]:
        return HostVerdict(
            host_id=fleet.ids[row],
            name=fleet.names[row],
            fits=True,
            weight=round(float(decision.total[row]), 4),
            weights={name: round(float(score[row]), 4) for name, score in decision.scores.items()},
        )
    return _excluded(fleet, request, decision.masks, row)


def _excluded(fleet: Fleet, request: Request, masks: Mapping[str, Bools], row: int) -> HostVerdict:
    verdicts = []
    for rule in FILTERS:
        if not masks[rule.name][row]:
            message, change = rule.explain(fleet, request, row)
            verdicts.append(Verdict(rule=rule.name, passed=False, message=message, change=change))
    return HostVerdict(host_id=fleet.ids[row], name=fleet.names[row], verdicts=tuple(verdicts))


def room(fleet: Fleet, request: Request) -> Room:
    """How many hosts would take the VM, and which of the others would have to change least: the fewest rules against
    it, one that is up before one that isn't. Explains only that one, so that many VMs can be asked about."""
    masks = {f.name: f.mask(fleet, request) for f in FILTERS}
    fits = np.logical_and.reduce(list(masks.values()))
    hosts = np.flatnonzero(masks["cluster"] & masks["excluded"])
    against = np.sum([~mask for mask in masks.values()], axis=0)
    others = [int(row) for row in hosts if not fits[row]]
    up = masks["host_state"]
    nearest = min(others, key=lambda r: (int(against[r]), not up[r], fleet.ids[r]), default=None)
    return Room(
        vm_id=request.need.vm_id,
        hosts=len(hosts),
        up=int(up[hosts].sum()),
        fitting=int(fits[hosts].sum()),
        memory_bytes=request.memory,
        nearest=None if nearest is None else _excluded(fleet, request, masks, nearest),
    )


def sentence(request: Request, hosts: Sequence[HostVerdict], *, known: bool = True) -> str:
    """The decision for a person: the host, or every host with its reasons. `known`: there is such a target."""
    if not known:
        target = request.place.target_host_id
        return f"no host can take {request.vm}: there is no host {target}; list hosts to see what exists"
    fitting = sum(host.fits for host in hosts)
    cluster = request.policy.name or request.need.cluster_id
    if fitting:
        others = f", the best of {fitting} that fit" if fitting > 1 else ", the only one that fits"
        return f"{request.vm} is placed on {hosts[0].name}{others}, of {len(hosts)} in cluster {cluster}"
    if not hosts:
        return (
            f"no host can take {request.vm}: cluster {cluster} has no hosts; add one, or move the VM to a "
            "cluster that has"
        )
    named = "; ".join(
        f"{host.name}: {', '.join(v.message for v in _telling(host))}" for host in hosts[:NAMED_HOSTS]
    )
    more = ""
    if len(hosts) > NAMED_HOSTS:
        counts = Counter(v.rule for host in hosts[NAMED_HOSTS:] for v in _telling(host))
        rules = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
        more = f"; {len(hosts) - NAMED_HOSTS} more were excluded by: {rules}"
    return f"no host of cluster {cluster} can take {request.vm}. {named}{more}"


def _telling(host: HostVerdict) -> Sequence[Verdict]:
    """That another host was asked for says nothing when there are other reasons."""
    return [v for v in host.verdicts if v.rule != "target"] or host.verdicts
