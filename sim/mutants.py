"""Mistakes that the product could have, put into it by name: `VOLERY_TEST_MUTANT=name make sim` must find each.

They live in the process of one seed and nowhere else; each names a seed that catches it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from host_agent import journal, orders
from host_agent.spool import Spool
from services.ha import fencing, restarts
from services.ha.policies.fencing import Decision, Silent, decide
from services.inventory import migration, reconcile, starting
from sim import alone
from volery.contracts.liveness import LivenessState
from volery.runtime.hear import HostHearing
from volery.runtime.operations import Operations
from volery.runtime.relay import Relay

VARIABLE = "VOLERY_TEST_MUTANT"


@dataclass(frozen=True)
class Mutant:
    """What is wrong, and a seed that catches it (0: none is known yet)."""

    apply: Callable[[], None]
    seed: int
    quick: bool = False
    """Tried by the test suite, too."""


def _put(module: ModuleType, name: str, mistake: Callable[..., Any]) -> None:
    """Where a module has imported a rule by name."""
    assert hasattr(module, name), f"{module.__name__} has no {name} any more: look for what took its place"
    setattr(module, name, mistake)


async def _nothing(*_: Any, **__: Any) -> None:
    """Instead of what should be done."""


async def _no_changes(*_: Any, **__: Any) -> list[Any]:
    return []


async def _no(*_: Any, **__: Any) -> bool:
    return False


def _operations_are_not_resumed() -> None:
    Operations.resume = _nothing  # type: ignore[method-assign]


def _strays_are_left() -> None:
    reconcile.LOOKS["stray"] = _nothing


def _claims_are_left() -> None:
    reconcile.LOOKS["claims"] = _nothing


def _stops_are_not_asked_again() -> None:
    reconcile.LOOKS["vm"] = _nothing


def _lower_epochs_are_obeyed() -> None:
    _put(journal, "judge", lambda order, known: None)


def _old_orders_are_obeyed() -> None:
    _put(orders, "stale", lambda order, now_beat: None)


def _boot_id_is_forgotten() -> None:
    """An agent goes on after a reboot with what it was doing before."""
    resumable = orders.Orders._resumable

    def forgetful(self: orders.Orders, found: journal.JournaledOrder) -> Any:
        return resumable(self, replace(found, boot_id=self._clock.boot_id))

    orders.Orders._resumable = forgetful  # type: ignore[method-assign]


def _failed_hosts_are_not_told_to_forget() -> None:
    async def only_claim(inv: Any, run: Any, vm_id: str, attempt: int, epoch: int, host_id: str) -> None:
        await starting.release_claim(inv, run, vm_id, epoch)

    starting._give_up_host = only_claim


def _failed_migrations_are_believed() -> None:
    migration._is_there = _no


def _facts_are_said_once() -> None:
    Spool._send_again = _nothing  # type: ignore[method-assign]


def _lost_streams_are_not_noticed() -> None:
    async def wait(self: Relay) -> None:
        await self.wake.wait()
        self.wake.clear()

    Relay._wait = wait  # type: ignore[method-assign]


def _gaps_are_not_noticed() -> None:
    async def due(self: HostHearing, fact: Any, payload: Any) -> bool:
        at = self.positions.get(payload.host_id)
        return fact is self.report or (at is not None and payload.seq > at.seq)

    HostHearing._due = due  # type: ignore[method-assign]


def _crashes_are_not_mended() -> None:
    restarts.look = _nothing


def _healthy_hosts_are_shot() -> None:
    def trigger_happy(silent: Silent, config: Any) -> Decision:
        seen = replace(silent, state=LivenessState.NON_RESPONSIVE, suspected=True, silence=100.0)
        return decide(seen if silent.state is LivenessState.UP else silent, config)

    async def look_at_everybody(ha: Any) -> None:
        for host_id in ha.watches:
            ha.core.wake(host_id)

    _put(fencing, "decide", trigger_happy)
    fencing.part.every(0.5)(look_at_everybody)


MUTANTS: dict[str, Mutant] = {
    "operations are not resumed": Mutant(_operations_are_not_resumed, 0),
    "strays are left": Mutant(_strays_are_left, 0),
    "claims are left": Mutant(_claims_are_left, 0),
    "stops are not asked again": Mutant(_stops_are_not_asked_again, 0),
    "lower epochs are obeyed": Mutant(_lower_epochs_are_obeyed, 0),
    "old orders are obeyed": Mutant(_old_orders_are_obeyed, 0),
    "boot id is forgotten": Mutant(_boot_id_is_forgotten, 0),
    "failed hosts are not told to forget": Mutant(_failed_hosts_are_not_told_to_forget, 0),
    "failed migrations are believed": Mutant(_failed_migrations_are_believed, 0),
    "facts are said once": Mutant(_facts_are_said_once, 0),
    "lost streams are not noticed": Mutant(_lost_streams_are_not_noticed, 0),
    "gaps are not noticed": Mutant(_gaps_are_not_noticed, 0),
    "crashes are not mended": Mutant(_crashes_are_not_mended, 1, quick=True),
    "healthy hosts are shot": Mutant(_healthy_hosts_are_shot, 1, quick=True),
}


def apply() -> None:
    """Puts the mistake that the environment names into this process. Raises KeyError for one that doesn't exist."""
    if name := os.environ.get(VARIABLE):
        MUTANTS[name].apply()


def caught_by(name: str, seed: int) -> bool:
    """Whether this seed breaks a law when the product has this mistake."""
    os.environ[VARIABLE] = name
    try:
        return bool(alone.run_one(seed).violations)
    finally:
        del os.environ[VARIABLE]


alone.before.append(apply)
