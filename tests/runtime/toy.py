"""A service with one noun, to try the runtime with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from volery.contracts.base import Call, Entity, Fact, Message, Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, Operation, Page
from volery.runtime.bus import LOST, Caller
from volery.runtime.core import Core
from volery.runtime.operations import busy
from volery.runtime.pages import page
from volery.runtime.run import Run
from volery.runtime.service import Part, Service
from volery.runtime.tables import Change, Nothing, Stale, Table, Taken


class Toy(Entity):
    name: str
    count: int = 0
    busy_with: str = ""
    note: str = ""


class CreateToy(Message):
    name: str
    note: str = ""


class Bump(Message):
    id: str


class Wind(Message):
    id: str
    steps: int = 3
    fail_at: int = -1
    lost_at: int = -1
    """The answer to this turn gets lost three times."""
    lost_after: int = -1
    """Behind this turn, outside any step, an answer gets lost once."""


TOY_CHANGED = Fact("fact.ha.toy.{id}.changed", Toy)
TOY_DELETED = Fact("fact.ha.toy.{id}.deleted", Toy)
CREATE_TOY = Call("ha.toy.create", CreateToy, Toy, mutates=True)
BUMP_TOY = Call("ha.toy.bump", Bump, Toy, mutates=True)
GET_TOY = Call("ha.toy.get", GetById, Toy)
LIST_TOYS = Call("ha.toy.list", ListQuery, Page)
WIND_TOY = Call("ha.toy.wind", Wind, Operation, mutates=True)
BREAK_TOY = Call("ha.toy.break", GetById, Toy)

TOYS: Table[Toy, Nothing] = Table(
    "toy", Toy, Nothing, columns={"name": "name", "count": "count"}, changed=TOY_CHANGED, deleted=TOY_DELETED
)


@dataclass
class ToyBox:
    core: Core
    wound: list[str]


@asynccontextmanager
async def open_toys(core: Core) -> AsyncIterator[ToyBox]:
    await core.pool.execute(
        """create table if not exists toy (id text primary key, revision bigint not null, doc text not null,
           private text not null, name text not null unique, count bigint not null)"""
    )
    yield ToyBox(core, [])


class ToyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


part = Part()


@part.answers(CREATE_TOY)
async def create(box: ToyBox, ask: CreateToy, caller: Caller) -> Toy:
    now = datetime.now(UTC)
    toy = Toy(id=new_id(), revision=1, created_at=now, updated_at=now, name=ask.name, note=ask.note)
    try:
        await box.core.commit(TOYS.insert(toy, Nothing()), caller=caller, answer=toy)
    except Taken:
        raise Refused(Kind.CONFLICT, f"there is a toy {ask.name!r} already") from None
    return toy


@part.answers(BUMP_TOY)
async def bump(box: ToyBox, ask: Bump, caller: Caller) -> Toy:
    while True:
        row = await TOYS.get(box.core.pool, ask.id)
        new = replace(row.public, count=row.public.count + 1)
        try:
            await box.core.commit(TOYS.update(row, new), caller=caller, answer=new)
        except Stale:
            continue
        return new


@part.answers(GET_TOY)
async def get(box: ToyBox, ask: GetById, caller: Caller) -> Any:
    return await TOYS.raw(box.core.pool, ask.id)


@part.answers(LIST_TOYS)
async def listed(box: ToyBox, ask: ListQuery, caller: Caller) -> Any:
    return await page(box.core.pool, TOYS, ask)


@part.answers(BREAK_TOY)
async def broken(box: ToyBox, ask: GetById, caller: Caller) -> Toy:
    raise ZeroDivisionError("a secret in a traceback")


@part.answers(WIND_TOY)
async def wind(box: ToyBox, ask: Wind, caller: Caller) -> Operation:
    row = await TOYS.get(box.core.pool, ask.id)
    busy(row.public, "toy", row.public.busy_with)
    op, begun = box.core.operations.begin(
        "toy.wind",
        object_kind="toy",
        object_id=ask.id,
        object_name=row.public.name,
        question=ask,
        caller=caller,
    )
    await box.core.commit(
        TOYS.update(row, replace(row.public, busy_with=op.id)), begun, caller=caller, answer=op
    )
    return op


@part.runs("toy.wind", deadline_seconds=30)
async def winding(box: ToyBox, run: Run) -> None:
    ask = run.input(Wind)

    async def unwind() -> None:
        box.wound.append("undone")

    run.undo("unwind", unwind)
    for number in range(ask.steps):

        async def turn(number: int = number) -> int:
            if number == ask.fail_at:
                raise Refused(Kind.UNAVAILABLE, "the spring broke; get another one")
            if number == ask.lost_at and box.wound.count("lost") < 3:
                box.wound.append("lost")
                raise Refused(Kind.TIMEOUT, "the key answers late; ask again", **{LOST: True})
            box.wound.append(f"turn {number}")
            return number

        assert await run.step(f"turn{number}", f"Turn {number}", turn, int) == number
        if number == ask.lost_after and "mislaid" not in box.wound:
            box.wound.append("mislaid")
            raise Refused(Kind.TIMEOUT, "nobody said whether it is wound; ask again", **{LOST: True})


async def release(box: ToyBox, operation: Operation) -> Sequence[Change]:
    row = await TOYS.find(box.core.pool, operation.object_id)
    if row is None or row.public.busy_with != operation.id:
        return ()
    return [TOYS.update(row, replace(row.public, busy_with=""))]


def toy_service() -> Service:
    return Service(Owner.HA, open_toys, ToyConfig, [part], release=release)
