"""A service end to end: calls, facts in the stream, idempotency, operations, rebuilt streams."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.runtime.toy import (
    BREAK_TOY,
    BUMP_TOY,
    CREATE_TOY,
    GET_TOY,
    LIST_TOYS,
    WIND_TOY,
    Bump,
    CreateToy,
    Wind,
    toy_service,
)
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import (
    CANCEL_OPERATION,
    ENDED,
    GET_OPERATION,
    CancelOperation,
    GetOperation,
    ListQuery,
    OperationState,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.relay import rebuild_stream
from volery.runtime.tail import Broken, follow


async def facts(bus: Bus, count: int, after: int = 0) -> list[dict]:
    async def collect() -> list[dict]:
        found: list[dict] = []
        while True:
            try:
                async with follow(bus.client, "FACTS_HA", after) as tail:
                    found.clear()
                    async for heard in tail:
                        found.append(json.loads(heard.body) | {"_position": heard.position})
                        if len(found) == count:
                            return found
            except Broken:
                continue

    while True:
        try:
            return await asyncio.wait_for(collect(), 15)
        except Exception as error:
            if "not found" not in str(error):
                raise
            await asyncio.sleep(0.05)


async def test_create_get_list_and_facts_in_order(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        toys = [await bus.ask(CREATE_TOY, CreateToy(name=f"t{i}")) for i in range(5)]
        assert (await bus.ask(GET_TOY, GetById(id=toys[0].id))).name == "t0"
        first = await bus.ask(LIST_TOYS, ListQuery(limit=3))
        assert len(first.items) == 3
        rest = await bus.ask(LIST_TOYS, ListQuery(limit=3, page=first.next))
        assert len(rest.items) == 2
        assert rest.next == ""
        by_name = await bus.ask(LIST_TOYS, ListQuery(order_by="-name", limit=2))
        assert [json.loads(bytes(i))["name"] for i in by_name.items] == ["t4", "t3"]
        more = await bus.ask(LIST_TOYS, ListQuery(order_by="-name", limit=2, page=by_name.next))
        assert [json.loads(bytes(i))["name"] for i in more.items] == ["t2", "t1"]
        await bus.ask(BUMP_TOY, Bump(id=toys[0].id))
        events = await facts(bus, 6)
        assert [e["_position"] for e in events] == [1, 2, 3, 4, 5, 6]
        assert [e["sequence"] for e in events] == ["1", "2", "3", "4", "5", "6"]
        assert events[0]["specversion"] == "1.0"
        assert events[0]["type"] == "dev.volery.ha.toy.changed"
        assert events[-1]["data"]["revision"] == 2
        assert events[-1]["data"]["count"] == 1


@pytest.mark.parametrize("token", ["x", "\xe4", "W10", "WyJcdTAwMDAiXQ", "eyJhIjoxfQ", "WzFd"])
async def test_a_page_token_that_no_list_answered_is_refused(configured: Settings, token: str) -> None:
    async with running(configured, toy_service()) as bus:
        with pytest.raises(Refused) as refused:
            await bus.ask(LIST_TOYS, ListQuery(page=token))
        assert refused.value.kind is Kind.INVALID


async def test_a_request_id_is_answered_once(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        caller = Caller("user:1", "key-1", "hash")
        answers = await asyncio.gather(
            *(bus.ask(CREATE_TOY, CreateToy(name="one"), caller) for _ in range(50))
        )
        assert len({a.id for a in answers}) == 1
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_TOY, CreateToy(name="two"), Caller("user:1", "key-1", "other"))
        assert refused.value.kind is Kind.MISMATCH
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_TOY, CreateToy(name="one"), Caller("user:2", "key-1", "hash"))
        assert refused.value.kind is Kind.CONFLICT


async def test_bugs_are_not_told(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        with pytest.raises(Refused) as refused:
            await bus.ask(BREAK_TOY, GetById(id="x"))
        assert refused.value.kind is Kind.INTERNAL
        assert "secret" not in refused.value.message


async def test_concurrent_changes_keep_order_without_gaps(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        toys = [await bus.ask(CREATE_TOY, CreateToy(name=f"t{i}")) for i in range(4)]
        await asyncio.gather(*(bus.ask(BUMP_TOY, Bump(id=t.id)) for t in toys for _ in range(20)))
        events = await facts(bus, 84)
        assert [e["_position"] for e in events] == list(range(1, 85))
        for toy in toys:
            revisions = [e["data"]["revision"] for e in events if e["data"]["id"] == toy.id]
            assert revisions == list(range(1, 22))


async def test_an_operation_ends_and_frees_its_object(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        toy = await bus.ask(CREATE_TOY, CreateToy(name="w"))
        op = await bus.ask(WIND_TOY, Wind(id=toy.id))
        ended = await wait_for(bus, op.id)
        assert ended.state is OperationState.SUCCEEDED
        assert [s.title for s in ended.steps] == ["Turn 0", "Turn 1", "Turn 2"]
        assert (await bus.ask(GET_TOY, GetById(id=toy.id))).busy_with == ""
        failing = await wait_for(bus, (await bus.ask(WIND_TOY, Wind(id=toy.id, fail_at=1))).id)
        assert failing.state is OperationState.FAILED
        assert failing.problem is not None
        assert "spring broke" in failing.problem.message
        assert (await bus.ask(GET_TOY, GetById(id=toy.id))).busy_with == ""


async def test_a_cancelled_operation_learns_what_came_of_its_step_before_it_undoes_anything(
    configured: Settings,
) -> None:
    async with running(configured, toy_service()) as bus:
        toy = await bus.ask(CREATE_TOY, CreateToy(name="toy"))
        operation = await bus.ask(WIND_TOY, Wind(id=toy.id, steps=2, lost_at=0))
        while not operation.steps:
            operation = await bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=operation.id))
        await bus.ask(CANCEL_OPERATION[Owner.HA], CancelOperation(id=operation.id))
        async with asyncio.timeout(10):
            while operation.state not in ENDED:
                operation = await bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=operation.id))
        assert operation.state is OperationState.CANCELLED
        assert [(step.name, step.state) for step in operation.steps] == [("turn0", OperationState.SUCCEEDED)]


async def test_an_answer_lost_between_steps_fails_no_operation(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        toy = await bus.ask(CREATE_TOY, CreateToy(name="toy"))
        operation = await bus.ask(WIND_TOY, Wind(id=toy.id, steps=2, lost_after=0))
        async with asyncio.timeout(10):
            while operation.state not in ENDED:
                operation = await bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=operation.id))
        assert operation.state is OperationState.SUCCEEDED


async def test_a_deleted_stream_comes_back_whole(configured: Settings) -> None:
    async with running(configured, toy_service()) as bus:
        toy = await bus.ask(CREATE_TOY, CreateToy(name="a"))
        for _ in range(9):
            await bus.ask(BUMP_TOY, Bump(id=toy.id))
        before = await facts(bus, 10)
    async with running(configured, toy_service()) as bus:
        owner = Bus(bus.client, "ha")
        await rebuild_stream(owner, Owner.HA)
        await bus.ask(BUMP_TOY, Bump(id=toy.id))
        after = await facts(bus, 11)
        assert after[:10] == before
        assert after[10]["data"]["revision"] == 11


async def wait_for(bus: Bus, operation_id: str):  # type: ignore[no-untyped-def]
    while True:
        op = await bus.ask(GET_OPERATION[Owner.HA], GetOperation(id=operation_id))
        if op.ended_at is not None:
            return op
        await asyncio.sleep(0.01)
