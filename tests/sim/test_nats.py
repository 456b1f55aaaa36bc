"""The bus in memory behaves as nats-server does: one suite for both."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StorageType, StreamConfig

from sim.loop import new_loop
from sim.nats import Link, MemoryClient, NatsServer
from volery.contracts.base import Call, Message
from volery.contracts.errors import Kind, Refused
from volery.runtime.bus import Answers, Bus, Caller
from volery.runtime.bus_client import open_client
from volery.runtime.connection import settle
from volery.runtime.relay import EXPECTED_LAST_SEQUENCE
from volery.runtime.tail import Broken, follow
from volery.setup.embedded import Embedded

Open = Callable[..., Awaitable[Client]]
"""(name, **options) → a connected client"""
names = itertools.count(1)


def fresh(prefix: str) -> str:
    return f"{prefix}{next(names)}"


class Question(Message):
    text: str = ""


class Answer(Message):
    text: str


@asynccontextmanager
async def pair(open_: Open) -> AsyncIterator[tuple[Client, Client]]:
    one, two = await open_("one"), await open_("two")
    try:
        yield one, two
    finally:
        await one.close()
        await two.close()


async def messages_arrive_in_order_with_headers(open_: Open) -> None:
    async with pair(open_) as (one, two):
        subject = fresh("order")
        sub = await two.subscribe(f"{subject}.*")
        await settle(two)
        for number in range(50):
            await one.publish(f"{subject}.x", str(number).encode(), headers={"N": str(number)})
        heard = [await sub.next_msg(2) for _ in range(50)]
        assert [m.data for m in heard] == [str(n).encode() for n in range(50)]
        assert heard[7].headers == {"N": "7"}
        assert heard[7].subject == f"{subject}.x"


async def wildcards_match_as_documented(open_: Open) -> None:
    async with pair(open_) as (one, two):
        top = fresh("wild")
        heard: list[tuple[str, str]] = []

        def into(name: str) -> Callable[[Msg], Awaitable[None]]:
            async def hear(message: Msg) -> None:
                heard.append((name, message.subject))

            return hear

        for pattern in (f"{top}.*.a", f"{top}.>", f"{top}.b.a", f"{top}"):
            await two.subscribe(pattern, cb=into(pattern))
        await settle(two)
        for subject in (f"{top}.b.a", f"{top}.b", top, f"{top}.b.a.c"):
            await one.publish(subject)
        await one.flush()
        await settle(two)
        assert sorted(heard) == sorted(
            [
                (f"{top}.*.a", f"{top}.b.a"),
                (f"{top}.>", f"{top}.b.a"),
                (f"{top}.b.a", f"{top}.b.a"),
                (f"{top}.>", f"{top}.b"),
                (top, top),
                (f"{top}.>", f"{top}.b.a.c"),
            ]
        )


async def one_of_a_queue_group_gets_each_message(open_: Open) -> None:
    async with pair(open_) as (one, two):
        subject, counts = fresh("queue"), [0, 0, 0]

        def into(index: int) -> Callable[[Msg], Awaitable[None]]:
            async def hear(message: Msg) -> None:
                counts[index] += 1

            return hear

        await one.subscribe(subject, queue="q", cb=into(0))
        await two.subscribe(subject, queue="q", cb=into(1))
        await two.subscribe(subject, cb=into(2))
        await settle(one)
        await settle(two)
        for _ in range(40):
            await one.publish(subject)
        await settle(one)
        await settle(two)
        assert counts[0] + counts[1] == 40
        assert counts[2] == 40
        assert min(counts) > 0


async def a_question_nobody_answers_fails_at_once(open_: Open) -> None:
    async with pair(open_) as (one, _two):
        with pytest.raises(nats.errors.NoRespondersError):
            await one.request(fresh("nobody"), timeout=5)


async def a_question_that_is_heard_and_not_answered_times_out(open_: Open) -> None:
    async with pair(open_) as (one, two):
        subject = fresh("mute")
        sub = await two.subscribe(subject)
        await settle(two)
        with pytest.raises(nats.errors.TimeoutError):
            await one.request(subject, b"?", timeout=0.2)
        message = await sub.next_msg(1)
        await message.respond(b"late")
        await settle(two)


async def services_answer_refuse_and_close(open_: Open) -> None:
    async with pair(open_) as (one, two):
        top = fresh("svc")
        call = Call(f"{top}.ask", Question, Answer, timeout_seconds=5)

        async def handler(question: Question, caller: Caller) -> Answer:
            if question.text == "no":
                raise Refused(Kind.CONFLICT, "not now", object="x")
            await asyncio.sleep(0.01)
            return Answer(text=question.text.upper())

        answers = Answers(Bus(two, top))
        await answers.open({call.subject: (call, handler)})
        await settle(two)
        bus = Bus(one, "asker")
        found = await asyncio.gather(*(bus.ask(call, Question(text=f"t{n}")) for n in range(20)))
        assert [a.text for a in found] == [f"T{n}" for n in range(20)]
        with pytest.raises(Refused, match="not now") as refused:
            await bus.ask(call, Question(text="no"))
        assert refused.value.kind is Kind.CONFLICT
        assert refused.value.details == {"object": "x"}
        await answers.close(1)
        with pytest.raises(Refused, match="nobody answers"):
            await bus.ask(call, Question(), again=False)


async def publishing_expects_its_predecessor(open_: Open) -> None:
    async with pair(open_) as (one, _two):
        stream = fresh("S")
        js = one.jetstream(timeout=5)
        config = StreamConfig(
            name=stream,
            subjects=[f"{stream}.>"],
            storage=StorageType.FILE,
            first_seq=11,
            metadata={"history": "h"},
        )
        made = await js.add_stream(config)
        assert (made.state.last_seq, made.config.metadata["history"]) == (10, "h")
        again = await js.add_stream(config)
        assert again.state.last_seq == 10
        acks = [
            await js.publish_async(f"{stream}.a", b"x", headers={EXPECTED_LAST_SEQUENCE: str(10 + n)})
            for n in range(5)
        ]
        assert [(await ack).seq for ack in acks] == [11, 12, 13, 14, 15]
        answer = await one.request(f"{stream}.a", b"x", timeout=5, headers={EXPECTED_LAST_SEQUENCE: "3"})
        assert json.loads(answer.data)["error"]["err_code"] == 10071
        info = await js.stream_info(stream)
        assert (info.state.first_seq, info.state.last_seq, info.state.messages) == (11, 15, 5)
        await js.purge_stream(stream, seq=14)
        info = await js.stream_info(stream)
        assert (info.state.first_seq, info.state.last_seq, info.state.messages) == (14, 15, 2)
        await js.delete_stream(stream)
        with pytest.raises(nats.js.errors.NotFoundError):
            await js.stream_info(stream)
        lost = await js.publish_async(f"{stream}.a", b"x")
        with pytest.raises(nats.js.errors.NoStreamResponseError):
            await lost


async def a_follower_gets_everything_behind_its_position(open_: Open) -> None:
    async with pair(open_) as (one, two):
        stream = fresh("F")
        js = one.jetstream(timeout=5)
        await js.add_stream(StreamConfig(name=stream, subjects=[f"{stream}.>"], metadata={"history": "h1"}))
        for number in range(6):
            await js.publish(f"{stream}.{'ab'[number % 2]}.x", str(number).encode())
        async with follow(two, stream, 2, [f"{stream}.a.*"]) as tail:
            assert (tail.standing.history, tail.standing.last) == ("h1", 6)
            messages = aiter(tail)
            heard = [await anext(messages), await anext(messages)]
            assert [(h.position, h.body) for h in heard] == [(3, b"2"), (5, b"4")]
            for number in (6, 7, 8):
                await js.publish(f"{stream}.{'ab'[number % 2]}.x", str(number).encode())
            later = [await anext(messages), await anext(messages)]
            assert [(h.position, h.body, h.subject) for h in later] == [
                (7, b"6", f"{stream}.a.x"),
                (9, b"8", f"{stream}.a.x"),
            ]
        with pytest.raises(nats.js.errors.NotFoundError):
            async with follow(two, fresh("none"), 0):
                pass
        await js.delete_stream(stream)


async def a_follower_lives_through_silence_and_notices_that_its_stream_is_gone(open_: Open) -> None:
    async with pair(open_) as (one, two):
        stream = fresh("G")
        js = one.jetstream(timeout=5)
        await js.add_stream(StreamConfig(name=stream, subjects=[f"{stream}.>"]))
        async with follow(two, stream, 0) as tail:
            messages = aiter(tail)
            waiting = asyncio.ensure_future(anext(messages))
            done, _ = await asyncio.wait([waiting], timeout=4.5)
            assert not done, "heartbeats keep a quiet follower going"
            await js.publish(f"{stream}.x", b"at last")
            assert (await waiting).body == b"at last"
            await js.delete_stream(stream)
            with pytest.raises(Broken):
                await anext(messages)


async def a_closed_client_says_so(open_: Open) -> None:
    closed = asyncio.Event()

    async def told() -> None:
        closed.set()

    client = await open_("c", closed_cb=told)
    await client.close()
    assert closed.is_set()
    assert client.is_closed
    with pytest.raises(nats.errors.ConnectionClosedError):
        await client.publish("x")


SUITE: tuple[Callable[[Open], Awaitable[None]], ...] = (
    messages_arrive_in_order_with_headers,
    wildcards_match_as_documented,
    one_of_a_queue_group_gets_each_message,
    a_question_nobody_answers_fails_at_once,
    a_question_that_is_heard_and_not_answered_times_out,
    services_answer_refuse_and_close,
    publishing_expects_its_predecessor,
    a_follower_gets_everything_behind_its_position,
    a_follower_lives_through_silence_and_notices_that_its_stream_is_gone,
    a_closed_client_says_so,
)


def simulated(case: Callable[[Callable[[str], Any], NatsServer], Awaitable[None]]) -> None:
    """Runs a case on a server in memory; `open_` takes a link, too."""
    loop = new_loop(600.0)
    server = NatsServer(loop)

    async def open_(name: str, link: Link | None = None, **options: Any) -> Client:
        client = MemoryClient(server, link or Link(name))
        await client.connect(name=name, inbox_prefix=f"_INBOX.{name}", **options)
        return client

    async def main() -> None:
        await case(open_, server)

    loop.run(main())
    assert not loop.failed


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
def test_the_bus_in_memory(case: Any) -> None:
    simulated(lambda open_, _server: case(open_))


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
async def test_the_real_bus(case: Any, nats: Embedded) -> None:
    async def open_(name: str, **options: Any) -> Client:
        return await open_client(
            {"servers": [nats.url], "name": name, "inbox_prefix": f"_INBOX.{name}", **options}
        )

    await case(open_)


# What only the one in memory is made for: links that break.


def test_what_was_written_over_a_cut_link_arrives_if_it_is_mended_in_time() -> None:
    async def case(open_: Any, server: NatsServer) -> None:
        link = Link("far")
        far, near = await open_("far", link=link), await open_("near")
        sub = await near.subscribe("x")
        await settle(near)
        server.cut(link)
        await far.publish("x", b"1")
        await asyncio.sleep(1)
        server.mend(link)
        await far.publish("x", b"2")
        assert [(await sub.next_msg(1)).data for _ in range(2)] == [b"1", b"2"]
        assert far.stats["reconnects"] == 0

    simulated(case)


def test_a_link_cut_for_long_is_noticed_by_both_sides_and_comes_back() -> None:
    async def case(open_: Any, server: NatsServer) -> None:
        link = Link("far")
        far = await open_("far", link=link, pending_size=0)
        near, system = await open_("near"), await open_("sys")
        gone = await system.subscribe("$SYS.ACCOUNT.*.DISCONNECT")
        heard = await far.subscribe("y")
        sub = await near.subscribe("x")
        await settle(near)
        await settle(far)
        server.cut(link)
        await far.publish("x", b"lost")
        reason = json.loads((await gone.next_msg(3)).data)
        assert reason["reason"] == "Stale Connection"
        await asyncio.sleep(4)
        assert not far.is_connected
        with pytest.raises(nats.errors.OutboundBufferLimitError):
            await far.publish("x", b"never")
        server.mend(link)
        await asyncio.sleep(5)
        assert far.is_connected
        assert far.stats["reconnects"] == 1
        await far.publish("x", b"new")
        assert (await sub.next_msg(1)).data == b"new"
        await near.publish("y", b"subscribed again")
        assert (await heard.next_msg(1)).data == b"subscribed again"

    simulated(case)


def test_a_server_that_went_away_keeps_its_streams_unless_they_are_lost() -> None:
    async def case(open_: Any, server: NatsServer) -> None:
        client = await open_("c")
        js = client.jetstream(timeout=2)
        await js.add_stream(StreamConfig(name="S", subjects=["s.>"]))
        await js.publish("s.1", b"x")
        server.stop()
        await asyncio.sleep(30)
        assert not client.is_connected
        server.start()
        await asyncio.sleep(3)
        assert (await js.stream_info("S")).state.last_seq == 1
        server.jetstream.lose()
        with pytest.raises(nats.js.errors.NotFoundError):
            await js.stream_info("S")

    simulated(case)
