"""What a host loses, lost soon: for tests of what follows from it."""

from __future__ import annotations

import dataclasses

from volery.contracts.base import Owner
from volery.runtime.programs import Settings


def hurried(configured: Settings, owner: Owner, again_seconds: float) -> Settings:
    """What is away for 1.5 s is lost, and is back when it was there for so long; a host is told again after `again_seconds`."""
    named = {"LOST_AFTER": 1.5, "BACK_AFTER": 1.5, "AGAIN": again_seconds}
    environ = {f"VOLERY_{owner.upper()}_{name}_SECONDS": f"{seconds:g}" for name, seconds in named.items()}
    return dataclasses.replace(configured, environ=environ)
