"""One-time tickets of the agent's data server: who may send or fetch which bytes, for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from volery.runtime.clock import monotonic


@dataclass(frozen=True, slots=True)
class Ticket:
    """`purpose` is upload, download, serial or vnc; `target` is what that purpose's handler needs."""

    secret: str
    purpose: str
    target: Any
    expires_at: float
    """On the monotonic clock."""


@dataclass(slots=True)
class Tickets:
    """Lives in memory: after a restart of the agent the owner opens the transfer or console again."""

    clock: Callable[[], float] = monotonic
    _tickets: dict[str, Ticket] = field(default_factory=dict)

    def admit(self, secret: str, purpose: str, target: Any, expires_seconds: float) -> None:
        now = self.clock()
        self._tickets = {k: t for k, t in self._tickets.items() if t.expires_at > now}
        self._tickets[secret] = Ticket(secret, purpose, target, now + expires_seconds)

    def find(self, secret: str, purpose: str) -> Ticket | None:
        ticket = self._tickets.get(secret)
        if ticket is None or ticket.purpose != purpose or ticket.expires_at <= self.clock():
            return None
        return ticket

    def revoke(self, secret: str) -> None:
        self._tickets.pop(secret, None)

    def revoke_where(self, matches: Callable[[Ticket], bool]) -> list[Ticket]:
        """Revokes every ticket that matches; returns them, so that what they stand for can be ended."""
        revoked = [ticket for ticket in self._tickets.values() if matches(ticket)]
        for ticket in revoked:
            self.revoke(ticket.secret)
        return revoked
