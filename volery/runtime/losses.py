"""Who has lost something that its peers still have, with hysteresis: pure but for the times that it remembers.

A thing that nobody has is lost by nobody: then it is the thing that is broken, not its hosts. The time for which a host
has been without it begins anew whenever no peer has it, so that hosts which get it back one after the other don't lose
it to the first. Times are kept in memory: a new leader gives a host more time, never less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    lost_after: float
    """So long without it, while a peer has it: lost."""
    back_after: float
    """So long with it again: back."""


@dataclass(slots=True)
class Losses:
    """Of one thing, such as a storage domain."""

    without: dict[str, float] = field(default_factory=dict)
    """Host → since when it is without it while a peer has it, by the caller's monotonic clock."""
    back: dict[str, float] = field(default_factory=dict)
    """Host that has lost it → since when it has it again."""

    @property
    def waits(self) -> bool:
        """Whether a decision becomes due by time alone."""
        return bool(self.without or self.back)

    def decide(
        self,
        now: float,
        patience: Patience,
        lost: Mapping[str, str],
        has: Collection[str],
        lacks: Mapping[str, str],
        groups: Mapping[str, str],
    ) -> dict[str, str]:
        """Host → why, of those that have lost it now. `lost` is the former answer; `lacks` says why; hosts of the same
        group (never "") are peers. A host that is neither among those that have it nor among those that lack it isn't
        spoken of."""
        served = {groups.get(host, "") for host in has} - {""}
        without = {host for host in lacks if host not in has and host not in lost}
        _keep(self.without, {host for host in without if groups.get(host, "") in served}, now)
        _keep(self.back, {host for host in lost if host in has}, now)
        stays = {
            host: why
            for host, why in lost.items()
            if host in lacks or (host in self.back and now - self.back[host] < patience.back_after)
        }
        goes = {
            host: lacks[host] for host, since in self.without.items() if now - since >= patience.lost_after
        }
        return dict(sorted((stays | goes).items()))


def _keep(times: dict[str, float], hosts: set[str], now: float) -> None:
    """One time for each of these hosts: since when it has been among them."""
    for host in times.keys() - hosts:
        del times[host]
    for host in hosts:
        times.setdefault(host, now)
