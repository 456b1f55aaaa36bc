"""One round: users and faults at once, then quiet, then everything that must hold. The seed replays the choices."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.asking import Patient
from tests.faults.history import Witness
from tests.faults.invariants import Invariants
from tests.faults.users import Place, Promises, User

SEED = int(os.environ.get("VOLERY_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
ROUNDS = int(os.environ.get("VOLERY_TEST_ROUNDS", "1"))
LOGS = Path("/tmp/volery-chaos-logs")
"""Where the logs of a failed round are kept."""


@dataclass
class Round:
    """`strike` is one fault and its repair; `told` are the faults that were."""

    seed: int
    rest: Patient
    place: Place
    invariants: Invariants
    strike: Callable[[], Awaitable[None]]
    told: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def promises(self) -> Promises:
        return self.invariants.promises

    async def run(self, *, users: int, faults: int, operations: int, witness: Witness) -> None:
        """Users work until there were so many faults and operations. Raises AssertionError, users.Broken, NoAnswer."""
        began = time.monotonic()
        self.invariants.witness = witness
        stop, watching = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            follower = group.create_task(witness.watch(watching))
            await watching.wait()
            async with asyncio.TaskGroup() as working:
                for number in range(users):
                    rng = random.Random(f"{self.seed}/{number}")
                    user = User(number, rng, self.rest, self.place, self.promises)
                    working.create_task(user.work(stop))
                await self._strike(faults, operations)
                stop.set()
            self.seconds["storm"] = time.monotonic() - began
            await self.invariants.check()
            self.seconds["all"] = time.monotonic() - began
            follower.cancel()

    async def _strike(self, faults: int, operations: int) -> None:
        """Faults at random moments, spread over the operations that there are to be."""
        rng = random.Random(f"{self.seed}/faults")
        for number in range(faults):
            await asyncio.sleep(rng.uniform(0.2, 3.0))
            while len(self.promises.operations) < operations * number // faults:
                await asyncio.sleep(0.1)
            await self.strike()
        while len(self.promises.operations) < operations:
            await asyncio.sleep(0.1)

    def summary(self) -> str:
        promises = self.promises
        kinds = Counter(told.split()[0] for told in promises.operations.values())
        endings = sorted(self.invariants.failed.items())
        witness = self.invariants.witness
        return "\n".join(
            [
                f"{len(promises.operations)} operations and {len(promises.edits)} edits: {dict(kinds)}",
                f"{len(self.told)} faults: {self.told}",
                f"refused: {dict(promises.refusals)}",
                f"asked again after: {dict(self.rest.trouble)}",
                f"SSE connections: {witness.connections if witness else 0}",
                f"seconds: { {name: round(value) for name, value in self.seconds.items()} }",
                *(f"    {count:4} {ending}" for ending, count in endings),
            ]
        )
