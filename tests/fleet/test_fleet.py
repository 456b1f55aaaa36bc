"""A small fleet of simulated agents, whole: it comes up, is watched, and notices who is cut off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.rows import Line
from fleet.wire import Heard, HostWire
from volery.runtime.signing import Key

ROOT = Path(__file__).parents[2]
HOSTS, VMS, KILLED = 12, 60, 4


def test_a_fleet_comes_up_and_who_is_cut_off_is_noticed(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    asked = ["--hosts", HOSTS, "--vms", VMS, "--minutes", 0.1, "--kill", KILLED, "--output", output]
    subprocess.run([sys.executable, "-m", "fleet", *map(str, asked)], cwd=ROOT, check=True, timeout=240)
    lines = {line.name: line for line in msgspec.json.decode(output.read_bytes(), type=list[Line])}
    whole = f"fleet of {HOSTS:,} hosts, {VMS:,} VMs"
    assert lines[f"{whole}: hosts suspected at once"].ours == 0
    assert lines[f"{whole}: memory of the services (RSS)"].ours > 0
    cut = lines[f"{KILLED} of {HOSTS} hosts cut off at once: until all are non-responsive"]
    assert cut.ours >= 9.0, (
        "silence of 10 s makes a host non-responsive, and its last beat was half a second before"
    )
    assert "at most 0 were suspected" in cut.note


def test_a_kill_of_more_hosts_than_there_are_is_refused() -> None:
    asked = [sys.executable, "-m", "fleet", "--hosts", "3", "--kill", "4"]
    ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--kill is 1 to 3, not 4" in ended.stderr


class Quiet(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Nobody reads it."""


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_messages_are_heard_whole_however_the_stream_is_cut(bodies: list[bytes], data: st.DataObject) -> None:
    """Also with a body that looks like the protocol's own words."""
    stream = b"".join(
        b"MSG host.h.order 1 %s%d\r\n%s\r\nPING\r\n" % (b"reply.x " if n % 2 else b"", len(body), body)
        for n, body in enumerate(bodies)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))

    async def heard() -> list[tuple[bytes, str]]:
        found: list[tuple[bytes, str]] = []
        wire = HostWire("h", "", Key.new("user"))
        wire.connection_made(Quiet())

        async def hear(message: Heard) -> None:
            found.append((message.data, message.reply))

        await wire.subscribe("host.h.order", hear)
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            wire.data_received(stream[begin:end])
        await asyncio.gather(*wire.tasks)
        return found

    expected = [(body, "reply.x" if n % 2 else "") for n, body in enumerate(bodies)]
    assert asyncio.run(heard()) == expected
