"""The agent, the bus and the disk are killed while orders run: nothing acknowledged is lost, nothing happens twice."""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.agent_process import AgentProcess, Listener, enrol_by_hand, listener
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID, TOY, TOY_ONCE, Control, Toy, ToyDone, until
from volery.contracts.agent import (
    SIGNATURE_HEADER,
    CancelOrder,
    CommittedWord,
    OrderFinished,
    OrderState,
    Outcome,
)
from volery.contracts.base import encode
from volery.contracts.errors import Kind


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PlainBus]:
    server = PlainBus(tmp_path / "bus")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def boot(tmp_path: Path) -> Path:
    """The lab's way to say that the machine was powered off: a new boot id."""
    path = tmp_path / "boot_id"
    path.write_text("boot-1\n")
    return path


@pytest.fixture
def agent(tmp_path: Path, bus: PlainBus, control: Control, boot: Path) -> Iterator[AgentProcess]:
    enrol_by_hand(tmp_path / "state", control, bus.url)
    environment = {"VOLERY_AGENT_BOOT_ID_PATH": str(boot)}
    process = AgentProcess(tmp_path / "state", environment, "tests.support.toy_agent")
    yield process
    process.kill()


@pytest.fixture
async def ear(bus: PlainBus, control: Control) -> AsyncIterator[Listener]:
    async with listener(bus, control) as heard:
        yield heard


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def begun(marks: Path) -> None:
    await until(lambda: text(marks))


async def test_killed_in_the_middle_what_may_be_repeated_goes_on(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=1.0))
    assert (await ear.send(order)).state is OrderState.ACCEPTED
    await begun(tmp_path / "marks")
    agent.kill()
    agent.start()
    finished = await ear.finished(order)
    assert finished.outcome is Outcome.SUCCEEDED
    assert msgspec.json.decode(finished.result, type=ToyDone).resumed
    assert (tmp_path / "marks").read_text() == "xxx."


async def test_killed_in_the_middle_what_may_not_be_repeated_ends_unknown(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    order = await ear.order(TOY_ONCE, Toy(path=str(tmp_path / "marks"), seconds=60))
    await ear.send(order)
    await begun(tmp_path / "marks")
    agent.kill()
    agent.start()
    finished = await ear.finished(order)
    assert finished.outcome is Outcome.OUTCOME_UNKNOWN
    again = await ear.send(
        msgspec.structs.replace(order, beat_seq=(await ear.until(lambda: ear.beat)).beat_seq)
    )
    assert (again.state, again.outcome) == (OrderState.FINISHED, Outcome.OUTCOME_UNKNOWN)
    assert (tmp_path / "marks").read_text() == "x"


async def test_killed_while_it_was_cancelled_it_does_not_go_on_and_does_not_pretend(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    """What a former run began may have left something: nobody may take it for not done."""
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=60, stubborn_seconds=60))
    await ear.send(order)
    await begun(tmp_path / "marks")
    cancel = CancelOrder(host_id=HOST_ID, order_id=order.order_id)
    subject, payload, headers = ear.control.signed(cancel, "cancel")
    answer = await ear.client.request(subject, payload, timeout=5, headers=headers)
    assert msgspec.json.decode(answer.data)["state"] == "accepted"
    agent.kill()
    agent.start()
    assert (await ear.finished(order)).outcome is Outcome.OUTCOME_UNKNOWN
    assert text(tmp_path / "marks") == "x"


async def test_killed_and_back_after_the_deadline_the_outcome_is_unknown(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=60), deadline_seconds=1.0)
    await ear.send(order)
    await begun(tmp_path / "marks")
    agent.kill()
    await asyncio.sleep(1.0)
    agent.start()
    assert (await ear.finished(order)).outcome is Outcome.OUTCOME_UNKNOWN
    assert text(tmp_path / "marks") == "x"


async def test_a_host_that_comes_back_starts_nothing_by_itself(
    agent: AgentProcess, ear: Listener, tmp_path: Path, boot: Path
) -> None:
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=60))
    await ear.send(order)
    await begun(tmp_path / "marks")
    agent.kill()
    boot.write_text("boot-2\n")
    agent.start()
    finished = await ear.finished(order)
    assert finished.outcome is Outcome.FAILED
    assert finished.boot_id == "boot-2"
    assert (tmp_path / "marks").read_text() == "x"


async def test_a_clean_stop_leaves_running_orders_to_the_next_run(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=2.5))
    await ear.send(order)
    await begun(tmp_path / "marks")
    assert agent.stop() == 0
    agent.start()
    assert (await ear.finished(order)).outcome is Outcome.SUCCEEDED


async def test_an_order_sent_before_a_stop_of_the_machine_is_too_old_after_it(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    """What waited in a buffer while the agent stood still is refused by the agent's own clock."""
    agent.start()
    await ear.until(lambda: ear.of("inventory.reported"))
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks")), ttl_ms=500)
    assert agent.process is not None
    os.kill(agent.process.pid, 19)
    subject, payload, headers = ear.control.signed(order)
    waiting = asyncio.create_task(ear.client.request(subject, payload, timeout=10, headers=headers))
    await asyncio.sleep(0.7)
    os.kill(agent.process.pid, 18)
    answer = msgspec.json.decode((await waiting).data)
    assert answer["state"] == "refused"
    assert answer["problem"]["kind"] == Kind.STALE
    assert not (tmp_path / "marks").exists()


async def test_facts_survive_kill_and_come_again_until_they_are_committed(
    agent: AgentProcess, ear: Listener, bus: PlainBus, tmp_path: Path
) -> None:
    """The stream is lost, the agent is killed: its results come again. Committed ones don't."""
    agent.start()
    orders = [await ear.order(TOY, Toy(path=str(tmp_path / "m")), object_id=f"o{n}") for n in range(5)]
    for order in orders:
        await ear.send(order)
    first = [await ear.finished(order) for order in orders]
    agent.kill()
    bus.forget()
    async with listener(bus, ear.control) as later:
        agent.start()
        again = [await later.finished(order) for order in orders]
        assert [(f.seq, f.result) for f in again] == [(f.seq, f.result) for f in first]
        top = max(fact.seq for fact in again)
        word = CommittedWord(host_id=HOST_ID, owner="inventory", generation=again[0].generation, seq=top)
        await later.client.publish(f"host.{HOST_ID}.committed", encode(word))
        asked = CommittedWord(host_id=HOST_ID, owner="inventory", generation="", seq=0)
        await later.client.publish(f"host.{HOST_ID}.report", encode(asked))
        await later.until(lambda: [f for f in later.of("inventory.reported") if f.seq > top and not f.orders])
        agent.kill()
        bus.forget()
        async with listener(bus, ear.control) as last:
            agent.start()
            await last.until(lambda: last.of("inventory.reported"))
            assert last.of("inventory.order_finished") == []


async def test_facts_of_a_time_without_a_bus_come_in_order_afterwards(
    agent: AgentProcess, ear: Listener, bus: PlainBus, tmp_path: Path
) -> None:
    agent.start()
    orders = [
        await ear.order(TOY, Toy(path=str(tmp_path / "m"), seconds=0.5), object_id=f"o{n}") for n in range(20)
    ]
    await asyncio.gather(*(ear.send(order) for order in orders))
    bus.kill()
    await until(lambda: text(tmp_path / "m").count(".") == 20)
    bus.start()
    for order in orders:
        await ear.finished(order)
    numbers = [fact.seq for name, fact in ear.facts if name.startswith("inventory.")]
    assert list(dict.fromkeys(numbers)) == sorted(set(numbers))


async def test_without_a_control_plane_it_starts_and_goes_on(
    agent: AgentProcess, ear: Listener, bus: PlainBus, tmp_path: Path
) -> None:
    agent.start()
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=0.5))
    await ear.send(order)
    await begun(tmp_path / "marks")
    bus.kill()
    agent.kill()
    agent.start()
    await until(lambda: text(tmp_path / "marks") == "xxx.")
    bus.start()
    assert (await ear.finished(order)).outcome is Outcome.SUCCEEDED


async def test_anything_may_die_at_any_moment(
    agent: AgentProcess, ear: Listener, bus: PlainBus, tmp_path: Path
) -> None:
    """Orders while the agent and the bus are killed at random: each ends once, none runs twice that must not."""
    seed = int(os.environ.get("VOLERY_TEST_SEED", random.randrange(1 << 30)))
    print(f"VOLERY_TEST_SEED={seed}")
    chance = random.Random(seed)
    agent.start()
    ends: dict[str, OrderFinished] = {}

    async def one(number: int) -> None:
        path = tmp_path / f"marks-{number}"
        kind = chance.choice((TOY, TOY_ONCE))
        toy = Toy(path=str(path), seconds=chance.uniform(0.0, 0.5))
        order = await ear.order(kind, toy, object_id=f"object-{number % 7}-{uuid.uuid4()}")
        while True:
            beat = await ear.until(lambda: ear.beat)
            order = msgspec.structs.replace(order, beat_seq=beat.beat_seq)
            ack = await ear.send(order, 60)
            if ack.problem is None or ack.problem.kind is not Kind.STALE:
                break
        finished = ends[order.order_id] = await ear.finished(order, 60)
        marks = text(path)
        if kind is TOY_ONCE:
            assert marks in ("", "x", "xx.")
            assert (finished.outcome is Outcome.SUCCEEDED) <= (marks == "xx.")
        else:
            assert finished.outcome is Outcome.SUCCEEDED
            assert marks.endswith("x.")

    async def trouble() -> None:
        while True:
            await asyncio.sleep(chance.uniform(0.1, 0.6))
            match chance.choice(("agent", "agent", "bus", "forget", "pause")):
                case "agent":
                    agent.kill()
                    agent.start()
                case "bus":
                    bus.kill()
                    await asyncio.sleep(chance.uniform(0.0, 0.3))
                    bus.start()
                case "forget":
                    bus.forget()
                case "pause":
                    bus.pause()
                    await asyncio.sleep(chance.uniform(0.0, 0.3))
                    bus.resume()

    troubling = asyncio.create_task(trouble())
    orders = [asyncio.create_task(one(number)) for number in range(40)]
    await asyncio.sleep(6.0)
    troubling.cancel()
    await asyncio.wait([troubling])
    if bus.stopped:
        bus.start()
    if agent.process is None:
        agent.start()
    await asyncio.gather(*orders)
    assert len(ends) == 40
    by_seq: dict[tuple[str, int], str] = {}
    for name, fact in ear.facts:
        if name == "inventory.order_finished":
            assert by_seq.setdefault((fact.generation, fact.seq), fact.order_id) == fact.order_id


async def test_a_signature_is_needed_on_the_wire_too(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    await ear.until(lambda: ear.of("inventory.reported"))
    order = await ear.order(TOY, Toy(path=str(tmp_path / "marks")))
    subject, payload, _ = ear.control.signed(order)
    answer = await ear.client.request(subject, payload, timeout=5, headers={SIGNATURE_HEADER: "nobody.x"})
    assert msgspec.json.decode(answer.data)["problem"]["kind"] == Kind.FORBIDDEN
    assert not (tmp_path / "marks").exists()
