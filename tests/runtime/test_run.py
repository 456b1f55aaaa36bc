"""A step that is written with what follows from it is written once, whoever else is at work and whatever gets lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from tests.runtime import toy
from tests.runtime.toy import CREATE_TOY, TOYS, Bump, CreateToy, ToyBox, ToyConfig
from tests.support.runtime import running
from volery.contracts.base import Call, Owner
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import (
    CANCEL_OPERATION,
    ENDED,
    GET_OPERATION,
    CancelOperation,
    GetOperation,
    Operation,
    OperationState,
)
from volery.runtime.bus import LOST, Bus, Caller
from volery.runtime.core import Core
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings
from volery.runtime.run import LATE_SECONDS, Run
from volery.runtime.service import Part, Service
from volery.runtime.tables import Change

RAISE_TOY = Call("ha.toy.raise", Bump, Operation, mutates=True)
ENOUGH = 10
LATER = 100

part = Part()


@dataclass
class Bench(ToyBox):
    act: Callable[[Bench, Run], Awaitable[None]]


@part.answers(RAISE_TOY)
async def raise_toy(bench: Bench, ask: Bump, caller: Caller) -> Operation:
    op, begun = bench.core.operations.begin(
        "toy.raise", object_kind="toy", object_id=ask.id, question=ask, caller=caller
    )
    await bench.core.commit(begun, caller=caller, answer=op)
    return op


@part.runs("toy.raise", deadline_seconds=60)
async def raising(bench: Bench, run: Run) -> None:
    await bench.act(bench, run)


@dataclass
class Stage:
    """A toy whose count is raised by an operation, and how often that was decided, asked for and answered."""

    configured: Settings
    act: Callable[[Bench, Run], Awaitable[None]]
    toy_id: str = ""
    op_id: str = ""
    bus: Bus | None = None

    @asynccontextmanager
    async def service(self) -> AsyncIterator[None]:
        @asynccontextmanager
        async def opened(core: Core) -> AsyncIterator[Bench]:
            async with toy.open_toys(core):
                yield Bench(core, [], self.act)

        made = Service(Owner.HA, opened, ToyConfig, [toy.part, part])
        async with running(self.configured, made) as self.bus:
            yield

    async def begin(self) -> None:
        assert self.bus is not None
        self.toy_id = (await self.bus.ask(CREATE_TOY, CreateToy(name="toy"))).id
        self.op_id = (await self.bus.ask(RAISE_TOY, Bump(id=self.toy_id))).id

    async def ended(self) -> Operation:
        assert self.bus is not None
        async with asyncio.timeout(30):
            while True:
                op = await self.bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=self.op_id))
                if op.state in ENDED:
                    return op
                await asyncio.sleep(0.02)


@dataclass
class Raising:
    """The toy's count becomes one more than it was, once; the answer says what it became."""

    held: asyncio.Event | None = None
    """The first decision waits for it."""
    decided: int = 0
    asked: int = 0
    began: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[int] = field(default_factory=list)
    loses_commits: int = 0
    """So many commits whose answer gets lost."""
    loses_answers: int = 0
    follows: bool = False

    async def changed(self, bench: Bench, run: Run) -> tuple[int, list[Change]]:
        row = await TOYS.get(bench.core.pool, run.operation.object_id)
        self.decided += 1
        self.began.set()
        if self.held is not None:
            held, self.held = self.held, None
            await held.wait()
        new = replace(row.public, count=row.public.count + 1)
        update = TOYS.update(row, new)
        if self.loses_commits:
            self.loses_commits -= 1
            update = update.and_then(lost)
        return new.count, [update]

    async def __call__(self, bench: Bench, run: Run) -> None:
        self.answers.append(await (self._followed if self.follows else self._written)(bench, run))

    async def _written(self, bench: Bench, run: Run) -> int:
        return await run.write("raise", "Raising it", lambda: self.changed(bench, run), int)

    async def _followed(self, bench: Bench, run: Run) -> int:
        async def ask() -> int:
            self.asked += 1
            if self.loses_answers:
                self.loses_answers -= 1
                raise Refused(Kind.TIMEOUT, "nobody answered in time", **{LOST: True})
            return self.asked + LATER

        async def settle(answer: int) -> Sequence[Change]:
            _, changes = await self.changed(bench, run)
            return changes

        return await run.step("raise", "Raising it", ask, int, follows=settle)


def lost() -> None:
    """The connection breaks between the commit and its answer."""
    raise ConnectionError("a test says so")


async def count(stage: Stage) -> int:
    assert stage.bus is not None
    return (await stage.bus.ask(toy.GET_TOY, toy.GetById(id=stage.toy_id))).count


async def until_begun(raising: Raising) -> None:
    async with asyncio.timeout(30):
        await raising.began.wait()


both = pytest.mark.parametrize("follows", [False, True], ids=["write", "follows"])


@both
async def test_a_crash_before_the_commit_writes_it_afterwards(configured: Settings, follows: bool) -> None:
    raising = Raising(follows=follows, held=asyncio.Event())
    stage = Stage(configured, raising)
    async with stage.service():
        await stage.begin()
        await until_begun(raising)
    async with stage.service():
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 1
    assert raising.decided == 2
    assert len(raising.answers) == 1


@both
async def test_a_crash_after_the_commit_gives_the_recorded_answer(
    configured: Settings, follows: bool
) -> None:
    raising, after = Raising(follows=follows), asyncio.Event()

    async def and_wait(bench: Bench, run: Run) -> None:
        await raising(bench, run)
        if not after.is_set():
            after.set()
            await asyncio.Event().wait()

    stage = Stage(configured, and_wait)
    async with stage.service():
        await stage.begin()
        async with asyncio.timeout(30):
            await after.wait()
    async with stage.service():
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 1
    assert (raising.decided, raising.asked) == (1, int(follows))
    assert len(set(raising.answers)) == 1
    assert len(raising.answers) == 2


@both
async def test_a_commit_whose_answer_got_lost_is_not_made_again(configured: Settings, follows: bool) -> None:
    raising = Raising(follows=follows, loses_commits=1)
    stage = Stage(configured, raising)
    async with stage.service():
        await stage.begin()
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 1
    assert raising.decided == 1
    assert raising.answers == [1 + LATER if follows else 1]


async def test_a_question_whose_answer_got_lost_is_asked_again_and_written_once(configured: Settings) -> None:
    raising = Raising(follows=True, loses_answers=2)
    stage = Stage(configured, raising)
    async with stage.service():
        await stage.begin()
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 1
    assert (raising.asked, raising.decided, raising.answers) == (3, 1, [3 + LATER])


@both
async def test_what_somebody_changed_meanwhile_is_decided_again(configured: Settings, follows: bool) -> None:
    """Neither the answer nor half of the changes is written from what was read before."""
    held = asyncio.Event()
    raising = Raising(follows=follows, held=held)
    stage = Stage(configured, raising)
    async with stage.service():
        await stage.begin()
        await until_begun(raising)
        assert stage.bus is not None
        await stage.bus.ask(toy.BUMP_TOY, Bump(id=stage.toy_id))
        held.set()
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 2
    assert (raising.decided, raising.asked) == (2, int(follows))
    assert raising.answers == [1 + LATER if follows else 2]


@both
async def test_a_leader_that_lost_its_token_takes_the_next_ones_answer(
    configured: Settings, follows: bool
) -> None:
    """It decides for a while yet. What the next leader has written isn't written a second time."""
    held = asyncio.Event()
    former = Raising(follows=follows, held=held)
    found: list[tuple[Bench, Run]] = []

    async def act(bench: Bench, run: Run) -> None:
        found.append((bench, run))
        await former(bench, run)

    stage = Stage(configured, act)
    async with stage.service():
        await stage.begin()
        await until_begun(former)
        ((bench, run),) = found
        row = await run.operations.table.get(run.operations.pool, stage.op_id)
        if follows:  # the next leader's question is answered otherwise
            former.asked += 1
        following = Raising(follows=follows, asked=former.asked)
        await following(bench, Run(run.operations, row))
        assert await count(stage) == 1
        held.set()
        assert (await stage.ended()).state is OperationState.SUCCEEDED
        assert await count(stage) == 1
    assert former.answers == following.answers


@both
async def test_a_cancellation_that_comes_meanwhile_is_kept_and_nothing_is_lost(
    configured: Settings, follows: bool
) -> None:
    """It writes the operation, too; what was decided holds."""
    held = asyncio.Event()
    raising = Raising(follows=follows, held=held)

    async def and_check(bench: Bench, run: Run) -> None:
        await raising(bench, run)
        run.checkpoint()

    stage = Stage(configured, and_check)
    async with stage.service():
        await stage.begin()
        await until_begun(raising)
        assert stage.bus is not None
        await stage.bus.ask(CANCEL_OPERATION[Owner.HA], CancelOperation(id=stage.op_id))
        held.set()
        ended = await stage.ended()
        assert ended.state is OperationState.CANCELLED
        assert [(step.name, step.state) for step in ended.steps] == [("raise", OperationState.SUCCEEDED)]
        assert await count(stage) == 1
    assert (raising.decided, len(raising.answers)) == (1, 1)


@dataclass
class Turning:
    """Two steps, of which each is turned once more at each attempt, and what the operation looked like in the second."""

    done: list[str] = field(default_factory=list)
    seen: list[Operation] = field(default_factory=list)
    revisions: list[int] = field(default_factory=list)
    waits: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first step has been done; nothing else is written then."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, bench: Bench, run: Run) -> None:
        async def first() -> int:
            self.done.append("first")
            return len(self.done)

        async def second() -> None:
            self.done.append("second")
            table = run.operations.table
            self.seen.append((await table.get(run.operations.pool, run.id)).public)

        await run.step("first", "First", first, int)
        self.revisions.append(run.operation.revision)
        self.waits.set()
        await self.go_on.wait()
        await run.step("second", "Second", second)


async def test_the_end_of_a_step_is_written_with_the_begin_of_the_next(configured: Settings) -> None:
    turning = Turning()
    turning.go_on.set()
    stage = Stage(configured, turning)
    async with stage.service():
        await stage.begin()
        ended = await stage.ended()
    (seen,) = turning.seen
    states = [(step.name, step.state) for step in seen.steps]
    assert states == [("first", OperationState.SUCCEEDED), ("second", OperationState.RUNNING)]
    assert [step.state for step in ended.steps] == [OperationState.SUCCEEDED] * 2
    assert (turning.revisions, seen.revision, ended.revision) == ([2], 3, 4)


async def test_the_end_of_a_step_is_written_soon_when_nothing_else_is(configured: Settings) -> None:
    turning = Turning()
    stage = Stage(configured, turning)
    async with stage.service():
        await stage.begin()
        async with asyncio.timeout(30):
            await turning.waits.wait()
            assert stage.bus is not None
            while True:
                op = await stage.bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=stage.op_id))
                if op.steps and op.steps[0].state is OperationState.SUCCEEDED:
                    break
                await asyncio.sleep(0.02)
    turning.go_on.set()
    async with stage.service():
        assert (await stage.ended()).state is OperationState.SUCCEEDED
    assert turning.done == ["first", "second"]


async def test_a_late_end_that_meets_a_lock_while_its_service_ends_keeps_nothing_open(
    configured: Settings,
) -> None:
    stepped, left = asyncio.Event(), asyncio.Event()

    async def act(bench: Bench, run: Run) -> None:
        async def first() -> int:
            return 1

        await run.step("first", "First", first, int)
        stepped.set()
        try:
            await left.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(3 * LATE_SECONDS)  # what this waits for is the write of the end
            raise

    stage = Stage(configured, act)
    async with open_direct(configured.database, Owner.HA) as other:
        async with stage.service():
            await stage.begin()
            await stepped.wait()
            held = other.transaction()
            await held.start()
            await other.execute("select 1 from operation where id = $1 for update", stage.op_id)
        await held.rollback()
    left.set()
    async with stage.service():
        assert (await stage.ended()).state is OperationState.SUCCEEDED


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_begin_of_the_next_step_is_written_with_an_end_and_tried_unless_cancelled(
    configured: Settings, cancelled: bool
) -> None:
    decided, done = asyncio.Event(), list[str]()
    go_on = asyncio.Event()

    async def act(bench: Bench, run: Run) -> None:
        async def decide() -> tuple[int, list[Change]]:
            return 1, []

        async def second() -> int:
            done.append("second")
            return 2

        await run.write("first", "First", decide, int, then=lambda answer: ("second", f"Second of {answer}"))
        decided.set()
        await go_on.wait()
        await run.step("second", "Second of 1", second, int)

    stage = Stage(configured, act)
    async with stage.service():
        await stage.begin()
        async with asyncio.timeout(30):
            await decided.wait()
        assert stage.bus is not None
        op = await stage.bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=stage.op_id))
        assert [(step.title, step.state) for step in op.steps] == [
            ("First", OperationState.SUCCEEDED),
            ("Second of 1", OperationState.RUNNING),
        ]
        if cancelled:
            await stage.bus.ask(CANCEL_OPERATION[Owner.HA], CancelOperation(id=stage.op_id))
        go_on.set()
        ended = await stage.ended()
    assert ended.state is (OperationState.CANCELLED if cancelled else OperationState.SUCCEEDED)
    assert done == ([] if cancelled else ["second"])
