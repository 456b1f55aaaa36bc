"""Threads and lanes: deadlines, calls left behind, connections replaced. With real threads and a toy connection."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from host_agent.lane import Lane
from host_agent.threads import CallAbandoned, Stuck, Threads


@dataclass(eq=False)
class Connection:
    number: int
    alive: bool = True
    closed: threading.Event = field(default_factory=threading.Event)


@dataclass
class Opener:
    opened: list[Connection] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def open(self) -> Connection:
        self.gate.wait()
        self.opened.append(Connection(len(self.opened)))
        return self.opened[-1]

    def is_alive(self, connection: Connection) -> bool:
        return connection.alive

    def close(self, connection: Connection) -> None:
        connection.closed.set()


async def test_results_and_errors_come_back() -> None:
    threads = Threads("t", 2, Stuck())
    assert await threads.call(lambda: 6 * 7, 5) == 42
    with pytest.raises(ZeroDivisionError):
        await threads.call(lambda: 1 // 0, 5)
    threads.close()


async def test_no_more_calls_at_once_than_its_size() -> None:
    threads, running, most, lock = Threads("t", 3, Stuck()), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1

    await asyncio.gather(*(threads.call(work, 5) for _ in range(20)))
    assert most == 3
    threads.close()


async def test_a_stuck_call_is_left_behind_counted_and_told_when_it_returns() -> None:
    stuck = Stuck()
    threads, gate, told = Threads("t", 1, stuck), threading.Event(), asyncio.Queue[str]()
    with pytest.raises(CallAbandoned):
        await threads.call(gate.wait, 0.05, lambda: told.put_nowait("left"), lambda: told.put_nowait("back"))
    assert stuck.count == 1
    assert told.get_nowait() == "left"
    assert await threads.call(lambda: "others go on", 5) == "others go on"
    gate.set()
    assert await asyncio.wait_for(told.get(), 5) == "back"
    assert stuck.count == 0
    threads.close()


async def test_a_cancelled_coroutine_waits_for_its_call() -> None:
    stuck = Stuck()
    threads, gate, ended = Threads("t", 1, stuck), threading.Event(), threading.Event()

    def work() -> None:
        gate.wait()
        ended.set()

    call = asyncio.create_task(threads.call(work, 5))
    await asyncio.sleep(0)
    call.cancel()
    done, _ = await asyncio.wait({call}, timeout=0.05)
    assert not done
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()
    assert stuck.count == 0
    threads.close()


async def test_a_lane_keeps_its_connection_and_reopens_a_dead_one() -> None:
    opener = Opener()
    lane = Lane("l", 2, opener, Stuck())
    assert await lane.call(lambda c: c.number, 5) == 0
    assert await lane.call(lambda c: c.number, 5) == 0
    opener.opened[0].alive = False
    assert await lane.call(lambda c: c.number, 5) == 1
    lane.close()
    assert opener.opened[1].closed.wait(5)


async def test_a_stuck_call_costs_its_connection_only() -> None:
    opener, stuck, gate = Opener(), Stuck(), threading.Event()
    lane = Lane("l", 2, opener, stuck)
    fellow_gate, fellow_began = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def fellow(connection: Connection) -> int:
        loop.call_soon_threadsafe(fellow_began.set)
        fellow_gate.wait()
        return connection.number

    beside = asyncio.create_task(lane.call(fellow, 5))
    await fellow_began.wait()
    with pytest.raises(CallAbandoned):
        await lane.call(lambda c: gate.wait(), 0.05)
    assert await lane.call(lambda c: c.number, 5) == 1
    assert not opener.opened[0].closed.is_set()
    fellow_gate.set()
    assert await beside == 0
    assert not opener.opened[0].closed.is_set()
    gate.set()
    assert await asyncio.to_thread(opener.opened[0].closed.wait, 5)
    lane.close()


async def test_an_open_that_hangs_blocks_nobody_for_longer_than_its_deadline() -> None:
    opener, stuck = Opener(), Stuck()
    opener.gate.clear()
    lane = Lane("l", 1, opener, stuck)
    with pytest.raises(CallAbandoned):
        await lane.call(lambda c: c.number, 0.05)
    hanging, opener.gate = opener.gate, threading.Event()
    opener.gate.set()
    assert await lane.call(lambda c: c.number, 5) == 0
    assert stuck.count == 1
    hanging.set()
    lane.close()
