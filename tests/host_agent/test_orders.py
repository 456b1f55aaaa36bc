"""Orders are obeyed once, in order, while they are young, and only from their owner."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from host_agent.facts import FactClass
from tests.support.toy_host import (
    TOY,
    TOY_ONCE,
    TOY_OTHER,
    TOY_WHOLE,
    Control,
    Core,
    Toy,
    ToyDone,
    core,
    seed,
    until,
)
from volery.contracts.agent import (
    CancelOrder,
    CommittedWord,
    OrderAck,
    OrderFinished,
    OrderState,
    Outcome,
)
from volery.contracts.errors import Kind
from volery.runtime.signing import Signer


async def facts(at: Core, owner: str = "inventory") -> list[OrderFinished]:
    found = await at.journal.pending(owner, 0, 1000)
    return [msgspec.json.decode(f.body, type=OrderFinished) for f in found if f.subject.endswith("finished")]


async def ended(at: Core, ack: OrderAck) -> OrderFinished:
    """The fact that ends the order."""
    assert ack.state is OrderState.ACCEPTED, ack
    while True:
        for fact in await facts(at):
            if fact.order_id == ack.order_id:
                return fact
        await asyncio.sleep(0.005)


async def test_an_order_is_acknowledged_run_and_its_result_told_once(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks")), epoch=3)
        fact = await ended(at, await at.give(order))
        assert fact.outcome is Outcome.SUCCEEDED
        assert fact.generation == at.journal.generation
        done = msgspec.json.decode(fact.result, type=ToyDone)
        assert done == ToyDone(mark="x", resumed=False, epoch=3)
        again = await at.give(order)
        assert (again.state, again.outcome) == (OrderState.FINISHED, Outcome.SUCCEEDED)
        assert msgspec.json.decode(again.result, type=ToyDone) == done
        assert (tmp_path / "marks").read_text() == "xx."


async def test_a_repeat_gets_the_first_answer_even_when_it_is_late_or_committed(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks")))
        fact = await ended(at, await at.give(order))
        word = CommittedWord(
            host_id=order.host_id, owner="inventory", generation=fact.generation, seq=fact.seq
        )
        assert await at.journal.trim(word)
        at.pass_ms(3_600_000)
        again = await at.give(order)
        assert again.outcome is Outcome.SUCCEEDED
        assert (tmp_path / "marks").read_text() == "xx."


async def test_many_copies_at_once_run_once(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks"), seconds=0.05))
        acks = await asyncio.gather(*(at.give(order) for _ in range(100)))
        assert {ack.state for ack in acks} == {OrderState.ACCEPTED}
        await ended(at, acks[0])
        assert (tmp_path / "marks").read_text() == "xx."


async def test_one_object_is_done_one_order_at_a_time_others_meanwhile(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        path = str(tmp_path / "marks")
        first = await at.give(at.make(Toy(path=path, mark="a", seconds=0.3)))
        second = await at.give(at.make(Toy(path=path, mark="b")))
        other = await at.give(at.make(Toy(path=path, mark="c"), object_id="object-2"))
        await ended(at, other)
        assert (tmp_path / "marks").read_text() == "acc."
        await ended(at, first)
        await ended(at, second)
        assert (tmp_path / "marks").read_text() == "acc.a.bb."


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"epoch": 4, "order_seq": 9}, "epoch"),
        ({"epoch": 5, "order_seq": 2}, "order_seq"),
        ({"epoch": 6, "order_seq": 1}, "order_seq"),
    ],
)
async def test_what_is_behind_is_refused(tmp_path: Path, change: dict[str, int], rule: str) -> None:
    async with core(tmp_path) as at:
        toy = Toy(path=str(tmp_path / "marks"))
        await ended(at, await at.give(at.make(toy, epoch=5, order_seq=2)))
        ack = await at.give(at.make(toy, **change))
        assert ack.state is OrderState.REFUSED
        assert ack.problem is not None
        assert ack.problem.kind is Kind.CONFLICT
        assert ack.problem.details["rule"] == rule
        assert ack.problem.details["epoch"] == 5
        assert ack.problem.details["order_seq"] == 3
        assert (tmp_path / "marks").read_text() == "xx."


async def test_what_is_behind_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    control = Control()
    toy = Toy(path=str(tmp_path / "marks"))
    async with core(tmp_path, control) as at:
        await ended(at, await at.give(at.make(toy, epoch=5)))
    async with core(tmp_path, control) as at:
        ack = await at.give(at.make(toy, epoch=4))
        assert ack.state is OrderState.REFUSED


async def test_an_order_is_refused_when_its_time_is_over_and_obeyed_with_a_newer_beat(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks")), ttl_ms=1000)
        at.pass_ms(1001)
        ack = await at.give(order)
        assert ack.problem is not None
        assert ack.problem.kind is Kind.STALE
        assert not (tmp_path / "marks").exists()
        fresher = msgspec.structs.replace(order, beat_seq=at.clock.beat())
        await ended(at, await at.give(fresher))


async def test_nothing_that_a_former_boot_accepted_is_carried_out_after_a_reboot(tmp_path: Path) -> None:
    """Neither what was under way, nor what waited behind it, nor what may be repeated."""
    control, marks = Control(), tmp_path / "marks"
    async with core(tmp_path, control) as at:
        slow = Toy(path=str(marks), mark="a", seconds=60)
        under_way = await at.give(at.make(slow))
        once = await at.give(at.make(slow, TOY_ONCE, object_id="object-2"))
        waiting = await at.give(at.make(Toy(path=str(marks), mark="b")))
        await until(lambda: marks.exists() and marks.read_text() == "aa")
    async with core(tmp_path, control, boot_id="boot-2") as at:
        ends = {ack.order_id: await ended(at, ack) for ack in (under_way, once, waiting)}
        assert at.orders.running == 0
        again = await at.give(at.make(Toy(path=str(marks), mark="c")))  # the lane is free
        assert (await ended(at, again)).outcome is Outcome.SUCCEEDED
    assert marks.read_text() == "aac" + "c."
    outcomes = [ends[ack.order_id].outcome for ack in (under_way, once, waiting)]
    assert outcomes == [Outcome.FAILED, Outcome.OUTCOME_UNKNOWN, Outcome.FAILED]
    for end in ends.values():
        assert end.problem is not None
        assert "the host was rebooted before" in end.problem.message
        assert "nothing of it runs any more" in end.problem.message


async def test_age_survives_a_restart_and_a_beat_of_another_boot_is_never_young(tmp_path: Path) -> None:
    control = Control()
    toy = Toy(path=str(tmp_path / "marks"))
    async with core(tmp_path, control) as at:
        order = at.make(toy)
        beat = at.clock.beat()
    async with core(tmp_path, control) as at:
        assert at.clock.beat() >= beat
        await ended(at, await at.give(order))
        late = at.make(toy)
    async with core(tmp_path, control, boot_id="boot-2") as at:
        assert at.clock.beat() > beat
        ack = await at.give(late)
        assert ack.problem is not None
        assert ack.problem.kind is Kind.STALE
        future = at.make(toy, beat_seq=at.clock.beat() + 60_000)
        ack = await at.give(future)
        assert ack.problem is not None
        assert ack.problem.kind is Kind.STALE


async def test_only_its_owner_is_obeyed(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks")))
        stranger = Control(signer=Signer(seed()))
        subject, payload, headers = at.control.signed(order)
        attempts = [
            at.give(order, stranger),
            at.orders.hear(subject, payload, None),
            at.orders.hear(subject, payload + b" ", headers),
            at.orders.hear("host.another.order", payload, headers),
            at.give(msgspec.structs.replace(order, owner="storage")),
            at.give(msgspec.structs.replace(order, owner="ha")),
        ]
        for attempt in attempts:
            ack = await attempt
            assert ack.state is OrderState.REFUSED
            assert ack.problem is not None
            assert ack.problem.kind is Kind.FORBIDDEN
        assert not (tmp_path / "marks").exists()
        await ended(at, await at.give(order))


async def test_a_stranger_can_not_cancel(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks"), seconds=0.05))
        await at.give(order)
        cancel = CancelOrder(host_id=order.host_id, order_id=order.order_id)
        stranger = Control(signer=Signer(seed()))
        ack = await at.orders.hear_cancel(*stranger.signed(cancel, "cancel"))
        assert ack.problem is not None
        assert ack.problem.kind is Kind.FORBIDDEN
        fact = await ended(at, OrderAck(order_id=order.order_id, state=OrderState.ACCEPTED))
        assert fact.outcome is Outcome.SUCCEEDED


async def test_another_journal_is_not_mistaken_for_this_one(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        for generation in ("", "00000000-0000-4000-8000-000000000000"):
            ack = await at.give(at.make(Toy(path=str(tmp_path / "marks")), agent_generation=generation))
            assert ack.problem is not None
            assert ack.problem.kind is Kind.STALE
            assert ack.problem.details["generation"] == at.journal.generation


async def test_a_former_leader_is_refused(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        toy = Toy(path=str(tmp_path / "marks"))
        await ended(at, await at.give(at.make(toy, fencing_token=7)))
        order = at.make(toy, fencing_token=6, object_id="object-2")
        ack = await at.give(order)
        assert ack.problem is not None
        assert ack.problem.kind is Kind.STALE
        await ended(at, await at.give(msgspec.structs.replace(order, fencing_token=7)))


async def test_a_cancel_stops_what_runs(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks"), seconds=60))
        ack = await at.give(order)
        await until((tmp_path / "marks").exists)
        assert (await at.cancel(order.order_id)).state is OrderState.ACCEPTED
        assert (await ended(at, ack)).outcome is Outcome.CANCELLED
        assert (await at.cancel(order.order_id)).outcome is Outcome.CANCELLED
        assert (tmp_path / "marks").read_text() == "x"


async def test_what_is_never_cut_short_tells_how_it_ended(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks"), seconds=0.3), TOY_WHOLE)
        ack = await at.give(order)
        await until((tmp_path / "marks").exists)
        await at.cancel(order.order_id)
        assert (await ended(at, ack)).outcome is Outcome.SUCCEEDED
        assert (tmp_path / "marks").read_text() == "xx."


async def test_a_cancel_that_comes_first_wins_for_ever(tmp_path: Path) -> None:
    control = Control()
    async with core(tmp_path, control) as at:
        order = at.make(Toy(path=str(tmp_path / "marks")))
        assert (await at.cancel(order.order_id)).state is OrderState.UNKNOWN
        ack = await at.give(order)
        assert ack.state is OrderState.REFUSED
    async with core(tmp_path, control) as at:
        ack = await at.give(msgspec.structs.replace(order, beat_seq=at.clock.beat()))
        assert ack.state is OrderState.REFUSED
        assert not (tmp_path / "marks").exists()


async def test_a_waiting_order_that_is_cancelled_ends_at_once(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        first = at.make(Toy(path=str(tmp_path / "marks"), mark="a", seconds=60))
        second = at.make(Toy(path=str(tmp_path / "marks"), mark="b"))
        await at.give(first)
        waiting = await at.give(second)
        await at.cancel(second.order_id)
        assert (await ended(at, waiting)).outcome is Outcome.CANCELLED
        assert (tmp_path / "marks").read_text() == "a"


async def test_a_deadline_stops_the_order_also_while_it_waits(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        slow = at.make(Toy(path=str(tmp_path / "marks"), mark="a", seconds=60), deadline_seconds=0.2)
        waits = at.make(Toy(path=str(tmp_path / "marks"), mark="b"), deadline_seconds=0.1)
        for ack in [await at.give(slow), await at.give(waits)]:
            fact = await ended(at, ack)
            assert fact.outcome is Outcome.FAILED
            assert fact.problem is not None
            assert fact.problem.kind is Kind.TIMEOUT
        assert (tmp_path / "marks").read_text() == "a"


async def test_what_can_not_be_stopped_ends_unknown_and_keeps_its_object(tmp_path: Path) -> None:
    async with core(tmp_path, cancel_grace_seconds=0.1) as at:
        stubborn = Toy(path=str(tmp_path / "marks"), mark="a", seconds=60, stubborn_seconds=1.0)
        ack = await at.give(at.make(stubborn, deadline_seconds=0.1))
        after = await at.give(at.make(Toy(path=str(tmp_path / "marks"), mark="b")))
        assert (await ended(at, ack)).outcome is Outcome.OUTCOME_UNKNOWN
        assert (tmp_path / "marks").read_text() == "a"
        assert (await ended(at, after)).outcome is Outcome.SUCCEEDED


async def test_a_refusal_of_the_action_is_the_result(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        order = at.make(Toy(path=str(tmp_path / "marks"), refuse="no such disk: attach it first"))
        fact = await ended(at, await at.give(order))
        assert fact.outcome is Outcome.FAILED
        assert fact.problem is not None
        assert fact.problem.message == "no such disk: attach it first"
        assert fact.problem.details == {"mark": "x"}


async def test_a_bug_in_an_action_ends_its_order_and_nothing_else(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        broken = at.make(Toy(path=str(tmp_path / "missing" / "marks")))
        once = at.make(Toy(path=str(tmp_path / "missing" / "marks")), TOY_ONCE)
        fact = await ended(at, await at.give(broken))
        assert (fact.outcome, fact.problem and fact.problem.kind) == (Outcome.FAILED, Kind.INTERNAL)
        assert (await ended(at, await at.give(once))).outcome is Outcome.OUTCOME_UNKNOWN
        fine = await at.give(at.make(Toy(path=str(tmp_path / "marks"))))
        assert (await ended(at, fine)).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"path": 5}', TOY.kind),
        (b"[]", TOY.kind),
        (b'{"path": "/tmp/x"}', "toy.unheard_of"),
    ],
)
async def test_what_can_not_be_read_is_refused_for_good(tmp_path: Path, body: bytes, kind: str) -> None:
    async with core(tmp_path) as at:
        order = at.make(body, kind=kind)
        ack = await at.give(order)
        assert ack.problem is not None
        assert ack.problem.kind is Kind.INVALID
        readable = msgspec.structs.replace(
            order, kind=TOY.kind, body=msgspec.Raw(b'{"path": "%s"}' % str(tmp_path / "marks").encode())
        )
        assert (await at.give(readable)).state is OrderState.REFUSED


async def test_noise_is_answered(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        for noise in (b"", b"{}", b"\xff", b'{"order_id": "x"}'):
            ack = await at.orders.hear("host.x.order", noise, None)
            assert ack.state is OrderState.REFUSED


async def test_beyond_the_bound_orders_are_refused_for_now(tmp_path: Path) -> None:
    async with core(tmp_path, journal={"max_waiting_orders": 2}) as at:
        toys = [
            at.make(Toy(path=str(tmp_path / "marks"), seconds=0.2), object_id=f"object-{n}") for n in range(3)
        ]
        acks = [await at.give(order) for order in toys]
        assert [ack.state for ack in acks] == [OrderState.ACCEPTED, OrderState.ACCEPTED, OrderState.REFUSED]
        assert acks[2].problem is not None
        assert acks[2].problem.kind is Kind.EXHAUSTED
        await ended(at, acks[0])
        await ended(at, acks[1])
        await ended(at, await at.give(toys[2]))


async def test_long_work_of_one_family_never_holds_up_another(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        path = str(tmp_path / "marks")
        for n in range(70):
            await at.give(at.make(Toy(path=path, seconds=60), object_id=f"object-{n}"))
        other = at.make(Toy(path=path, mark="o"), TOY_OTHER, object_id="other")
        assert (await ended(at, await at.give(other))).outcome is Outcome.SUCCEEDED


async def test_the_newest_progress_is_told_and_goes_with_the_result(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        ack = await at.give(at.make(Toy(path=str(tmp_path / "marks"), seconds=0.3)))
        while not (found := await at.journal.pending("inventory", 0, 10)):
            await asyncio.sleep(0.005)
        assert found[0].subject.endswith("order_progressed")
        await ended(at, ack)
        assert len(await at.journal.pending("inventory", 0, 10)) == 1


async def test_secrets_leave_the_disk_when_the_order_ends(tmp_path: Path) -> None:
    async with core(tmp_path) as at:
        secret = "chap-password-of-a-disk"
        order = at.make(Toy(path=str(tmp_path / "marks"), mark=secret, refuse="no"), epoch=1)
        ack = await at.give(order)
        await ended(at, ack)
        fact = (await at.journal.pending("inventory", 0, 10))[0]
        await at.journal.put("inventory", fact.subject, b'{"after_seq":0}', FactClass.STATE, "k")
        word = CommittedWord(host_id="", owner="inventory", generation=at.journal.generation, seq=fact.seq)
        await at.journal.trim(word)
    stored = (tmp_path / "journal.sqlite").read_bytes()
    assert (tmp_path / "journal.sqlite").stat().st_mode & 0o777 == 0o600
    assert b"toy.work" in stored
    # The refusal's own details name the mark; the envelope must not be there any more.
    assert b'"refuse"' not in stored


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB that a test may fill."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


async def test_with_a_full_disk_orders_are_refused_for_now_and_no_result_is_lost(
    small_disk: Path, tmp_path: Path
) -> None:
    async with core(small_disk) as at:
        running = await at.give(at.make(Toy(path=str(tmp_path / "marks"), seconds=0.3)))
        assert running.state is OrderState.ACCEPTED
        fill(small_disk)
        body = Toy(path=str(tmp_path / "other"), refuse="x" * 20_000)
        while (ack := await at.give(at.make(body, object_id="object-2"))).state is OrderState.ACCEPTED:
            pass  # until the write-ahead log has used what was left
        assert ack.problem is not None
        assert ack.problem.kind is Kind.UNAVAILABLE
        assert "free space" in ack.problem.message
        await until(lambda: (tmp_path / "marks").read_text() == "xx.")
        (small_disk / "ballast").unlink()
        assert (await ended(at, running)).outcome is Outcome.SUCCEEDED
        assert (await at.give(at.make(body, object_id="object-3"))).state is OrderState.ACCEPTED


async def test_an_order_is_a_span_of_its_operations_trace(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with core(tmp_path, tracer=provider.get_tracer("test")) as at:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        subject, payload, headers = at.control.signed(at.make(Toy(path=str(tmp_path / "m"), refuse="no")))
        ack = await at.orders.hear(subject, payload, headers | {"traceparent": parent})
        await ended(at, ack)
        (span,) = await until(exporter.get_finished_spans)
        assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
        assert span.name == "order toy.work"
        assert span.attributes["volery.outcome"] == "failed"
        assert span.status.description == "no"
