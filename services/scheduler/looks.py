"""How often all claims are compared with all VMs: a look at everything takes a small share of the time, however many there are.

In between only those are compared of which something was heard lately: the others contradicted nothing when they were last
looked at, and a contradiction begins with a fact or a claim.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from volery.runtime.clock import monotonic

SHARE = 0.01
"""Of the time."""
MOST_SECONDS = 60.0
"""Between two looks at everything. What was heard between them is recent (store.RECENT_SECONDS)."""


@dataclass(slots=True)
class Looks:
    due_at: dict[str, float] = field(default_factory=dict)
    """What is looked at → when everything is again."""

    @asynccontextmanager
    async def one(self, what: str) -> AsyncIterator[bool]:
        """Whether what is recent is enough this time. A look that fails counts for nothing."""
        began = monotonic()
        recent = began < self.due_at.get(what, 0.0)
        yield recent
        if not recent:
            self.due_at[what] = began + min((monotonic() - began) / SHARE, MOST_SECONDS)
