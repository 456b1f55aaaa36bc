"""The one exception of set-up: a sentence for the person at the terminal that says what to do."""

from __future__ import annotations


class SetupError(RuntimeError):
    """What happened, to which object, why, and what to do; printed without a trace."""
