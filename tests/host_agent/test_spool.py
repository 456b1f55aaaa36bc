"""Facts go out in the order of their numbers, and again until their owner has committed them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import nats
import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.js.api import StreamConfig

from host_agent import spool as spool_module
from host_agent.facts import FactClass
from host_agent.journal import Journal
from host_agent.spool import Spool
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID
from volery.contracts.agent import CommittedWord

BODY = b'{"host_id":"h","generation":"","seq":0,"boot_id":"b","at":"2026-01-01T00:00:00Z","after_seq":0}'


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PlainBus]:
    server = PlainBus(tmp_path / "bus")
    server.start()
    yield server
    server.kill()


@dataclass
class Part:
    """A journal with its spool, connected, and the owner's stream."""

    journal: Journal
    spool: Spool
    client: Client
    reader: Client
    task: asyncio.Task[None] | None = None
    names: list[int] = field(default_factory=list)

    async def say(
        self, fact_class: FactClass = FactClass.EVENT, key: str | None = None, owner: str = "inventory"
    ) -> int:
        fact = await self.journal.put(owner, f"fact.host.{HOST_ID}.{owner}.toy", BODY, fact_class, key)
        return fact.seq

    async def committed(self, seq: int, generation: str | None = None) -> bool:
        word = CommittedWord(
            host_id=HOST_ID, owner="inventory", generation=generation or self.journal.generation, seq=seq
        )
        return await self.spool.committed(word)

    async def make_stream(self) -> None:
        js = self.reader.jetstream(timeout=0.5)
        while True:
            try:
                await js.add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
                return
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.05)

    async def stored(self, owner: str = "inventory") -> list[tuple[int, int]]:
        """(seq, after_seq) of the owner's facts in the stream, in its order."""
        js = self.reader.jetstream(timeout=0.5)
        info = await js.stream_info("FACTS_HOST")
        found = []
        for n in range(max(info.state.first_seq, 1), info.state.last_seq + 1):
            message = await js.get_msg("FACTS_HOST", n)
            assert message.subject is not None
            fact = msgspec.json.decode(message.data or b"")
            if message.subject.split(".")[3] == owner:
                found.append((fact["seq"], fact["after_seq"]))
        return found

    async def until(self, true: Callable[[list[tuple[int, int]]], Any], seconds: float = 10.0) -> Any:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    if true(found := await self.stored()):
                        return found
                except (nats.errors.Error, nats.js.errors.Error):
                    pass  # the bus is on its way back
                await asyncio.sleep(0.02)


@asynccontextmanager
async def part(bus: PlainBus, directory: Path, again_seconds: float = 5.0) -> AsyncIterator[Part]:
    journal = await Journal.open(directory / "journal.sqlite", "boot-1")
    client = Client()
    spool = Spool(journal, client, again_seconds)
    await spool.open()

    async def reconnected() -> None:
        spool.reconnected()

    await client.connect(
        bus.url, max_reconnect_attempts=-1, reconnect_time_wait=0.05, reconnected_cb=reconnected
    )
    reader = await nats.connect(bus.url, max_reconnect_attempts=-1, reconnect_time_wait=0.05)
    made = Part(journal, spool, client, reader)
    await made.make_stream()
    made.task = asyncio.create_task(spool.run())
    try:
        yield made
    finally:
        made.task.cancel()
        await asyncio.wait([made.task])
        await client.close()
        await reader.close()
        await journal.close()


async def test_facts_are_published_in_order_while_they_come(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path) as at:
        await asyncio.gather(*(at.say() for _ in range(300)))
        found = await at.until(lambda found: len(found) >= 300)
        assert found == [(n, n - 1) for n in range(1, 301)]
        assert at.spool.unsent == 0


async def test_each_owner_has_its_own_line(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path) as at:
        for _ in range(3):
            await at.say()
            await at.say(owner="storage")
        await at.until(lambda found: len(found) == 3)
        async with asyncio.timeout(5):
            while len(await at.stored("storage")) < 3:
                await asyncio.sleep(0.01)
        assert await at.stored("storage") == [(1, 0), (2, 1), (3, 2)]


async def test_what_a_former_run_left_goes_out(bus: PlainBus, tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path / "journal.sqlite", "boot-1")
    for n in range(1000):
        await journal.put(
            "inventory", f"fact.host.{HOST_ID}.inventory.toy", BODY, FactClass.STATE, f"k{n % 700}"
        )
    await journal.close()
    async with part(bus, tmp_path) as at:
        found = await at.until(lambda found: len(found) >= 700)
        assert [seq for seq, _ in found] == list(range(301, 1001))
        assert found[0] == (301, 0)


async def test_uncommitted_facts_come_again_and_committed_ones_do_not(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path, again_seconds=0.3) as at:
        for _ in range(6):
            await at.say()
        await at.until(lambda found: len(found) >= 6)
        assert await at.committed(4)
        found = await at.until(lambda found: len(found) >= 8)
        assert found[6:8] == [(5, 4), (6, 5)]
        assert await at.committed(6)
        count = len(await at.stored())
        await asyncio.sleep(1.0)
        assert len(await at.stored()) == count


async def test_a_lost_stream_is_filled_again_as_fast_as_its_owner_commits(
    bus: PlainBus, tmp_path: Path
) -> None:
    async with part(bus, tmp_path, again_seconds=0.2) as at:
        at.spool.window = 50
        for _ in range(500):
            at.names.append(await at.say())
        await at.until(lambda found: len(found) >= 500)
        bus.forget()
        await at.make_stream()
        position = 0
        async with asyncio.timeout(15):
            while position < 500:
                position = followed(await at.stored())
                await at.committed(position)
        assert await at.journal.pending("inventory", 0, 10) == []


async def test_silence_of_the_owner_makes_the_pauses_longer(bus: PlainBus, tmp_path: Path) -> None:
    """An owner that is down for a day must not find a day's worth of copies."""
    async with part(bus, tmp_path, again_seconds=0.1) as at:
        await at.say()
        await asyncio.sleep(2.0)
        copies = len(await at.stored())
        assert 2 <= copies <= 6


def followed(found: list[tuple[int, int]]) -> int:
    """How far an owner gets that takes the next fact and leaves out what has a gap before it."""
    position = 0
    for seq, after_seq in found:
        if after_seq <= position < seq:
            position = seq
    return position


async def test_nothing_is_lost_when_the_bus_goes_and_comes(bus: PlainBus, tmp_path: Path) -> None:
    """Also what the server acknowledged and lost: it had not written it yet when it was killed."""
    async with part(bus, tmp_path, again_seconds=0.5) as at:
        said = 0
        for _ in range(3):
            for _ in range(100):
                said = await at.say()
            bus.kill()
            for _ in range(100):
                said = await at.say()
            bus.start()
        await at.until(lambda found: followed(found) == said, 15)


async def test_without_a_stream_facts_wait(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path, again_seconds=0.2) as at:
        await at.reader.jetstream().delete_stream("FACTS_HOST")
        await at.say()
        await asyncio.sleep(0.1)
        await at.make_stream()
        await at.until(lambda found: found == [(1, 0)])


async def test_what_happens_during_a_report_is_told_after_it(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path) as at:
        await at.say()
        await at.until(lambda found: len(found) == 1)
        async with at.spool.report("inventory", rebase=False) as reservation:
            later = [await at.say(), await at.say(FactClass.RESULT)]
            await at.client.flush(5)
            assert len(await at.stored()) == 1
            await at.journal.put_report(reservation, f"fact.host.{HOST_ID}.inventory.reported", BODY)
        assert reservation.seq < min(later)
        found = await at.until(lambda found: len(found) == 4)
        assert found == [(1, 0), (2, 1), (3, 2), (4, 3)]


async def test_nothing_slips_out_before_a_report_that_was_begun_with_it(
    bus: PlainBus, tmp_path: Path
) -> None:
    """The report and what follows it may reach the disk in one commit."""
    async with part(bus, tmp_path) as at:
        for _ in range(30):

            async def report() -> None:
                async with at.spool.report("inventory", rebase=False) as reservation:
                    await asyncio.sleep(0.001)
                    await at.journal.put_report(reservation, f"fact.host.{HOST_ID}.inventory.reported", BODY)

            await asyncio.gather(at.say(), report(), at.say(), at.say())
        head = (await at.journal.positions())["inventory"].head
        found = await at.until(lambda found: found and found[-1][0] == head)
        numbers = [seq for seq, _ in found]
        assert numbers == sorted(numbers)


async def test_a_report_that_fails_holds_nothing_back(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path) as at:

        async def fails() -> None:
            async with at.spool.report("inventory", rebase=True):
                await at.say()
                raise LookupError("libvirt is away")

        with pytest.raises(LookupError):
            await fails()
        assert await at.until(lambda found: found == [(2, 0)])


async def test_words_of_another_journal_are_not_for_this_one(bus: PlainBus, tmp_path: Path) -> None:
    async with part(bus, tmp_path) as at:
        await at.say()
        assert await at.committed(1000, generation="another")
        assert len(await at.journal.pending("inventory", 0, 10)) == 1
        assert not await at.committed(1000)


async def test_a_fact_that_the_bus_can_not_carry_does_not_stop_the_others(
    bus: PlainBus, tmp_path: Path
) -> None:
    async with part(bus, tmp_path) as at:
        body = BODY[:-1] + b',"padding":"' + b"x" * (1 << 20) + b'"}'
        await at.journal.put("inventory", f"fact.host.{HOST_ID}.inventory.toy", body, FactClass.EVENT)
        await at.say()
        assert await at.until(lambda found: found == [(2, 1)])


def test_the_window_is_what_the_protocol_says() -> None:
    assert spool_module.AGAIN_SECONDS == 5.0
