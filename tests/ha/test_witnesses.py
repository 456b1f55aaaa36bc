"""Most hosts of a cluster are silent: whether ha acts is what its witnesses say, machines outside of the cluster."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.ha.bmcs import AGENT
from tests.ha.site import Site, site
from tests.ha.world import until
from volery.runtime.programs import Settings

CUT_OFF = "it may be ha that is cut off"

FENCE_AGENT = """#!/bin/sh
while read -r line; do
    case $line in action=*) action=${line#action=};; ip=*) ip=${line#ip=};; esac
done
if [ "$action" = metadata ]; then cat "$0.xml"; exit; fi
echo "$ip $action" >> "$0.asked"
case $action in
    off) : > "$0.$ip"; echo "Success: Powered OFF";;
    on) rm -f "$0.$ip"; echo "Success: Powered ON";;
    *) if [ -e "$0.$ip" ]; then echo "Status: OFF"; exit 2; fi; echo "Status: ON";;
esac
"""
METADATA = """<?xml version="1.0" ?>
<resource-agent name="fence_scripted" shortdesc="one machine per file">
<parameters>
<parameter name="action"><content type="string" default="off"/></parameter>
<parameter name="ip"><content type="string"/></parameter>
<parameter name="username"><content type="string"/></parameter>
<parameter name="password"><content type="string"/></parameter>
</parameters>
<actions><action name="on"/><action name="off"/><action name="status"/><action name="metadata"/></actions>
</resource-agent>
"""


@pytest.fixture
def own_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fence agent is installed where ha runs. Where it keeps what it was asked."""
    directory = tmp_path / "bin"
    directory.mkdir()
    agent = directory / AGENT
    agent.write_text(FENCE_AGENT)
    agent.chmod(0o755)
    Path(f"{agent}.xml").write_text(METADATA)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return Path(f"{agent}.asked")


def told(asked: Path) -> list[str]:
    """Hosts' BMCs that ha itself told to switch off."""
    lines = asked.read_text().splitlines() if asked.exists() else []
    return [line.removesuffix(" off") for line in lines if line.endswith(" off")]


@asynccontextmanager
async def witness() -> AsyncIterator[str]:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        yield "127.0.0.1:" + str(server.sockets[0].getsockname()[1])


@contextmanager
def silence() -> Iterator[str]:
    """An address where nobody answers: its backlog is full, so that the kernel takes no further connection."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(server.getsockname())
        yield "127.0.0.1:" + str(server.getsockname()[1])


@asynccontextmanager
async def most_are_silent(configured: Settings, tmp_path: Path, witnesses: str) -> AsyncIterator[Site]:
    more = {"VOLERY_HA_STORM_HOLD_SECONDS": "0.5", "VOLERY_HA_WITNESSES": witnesses}
    async with site(configured, tmp_path, 4, **more) as at:
        for heart in at.hearts[:3]:
            heart.stop()
        yield at


async def test_cut_off_from_its_witnesses_too_ha_orders_nothing_and_says_so(
    configured: Settings, tmp_path: Path, own_hands: Path
) -> None:
    with silence() as nobody:
        async with most_are_silent(configured, tmp_path, f"{nobody}, nonsense") as at:
            await orders_nothing(at, own_hands)


async def orders_nothing(at: Site, asked: Path) -> None:
    for number in range(3):
        said = await at.says(number, CUT_OFF, 60)
        assert "Look at the network, then confirm the hosts that are off" in said.fencing
    await asyncio.sleep(3)  # more than the silence before a fence
    assert [CUT_OFF in (await at.liveness(n)).fencing for n in range(3)] == [True] * 3
    assert told(asked) == []
    assert [record for record in await at.records() if record.requested_by == "service:ha"] == []


async def test_with_half_of_its_witnesses_ha_goes_on_as_far_as_the_brake_lets_it(
    configured: Settings, tmp_path: Path, own_hands: Path
) -> None:
    """One takes the connection, one is a machine that lives and refuses it."""
    async with witness() as refuses:
        pass
    async with AsyncExitStack() as stack:
        takes = await stack.enter_async_context(witness())
        nobody = stack.enter_context(silence())
        witnesses = f"{takes}, {refuses}, {nobody}, {nobody}"
        at = await stack.enter_async_context(most_are_silent(configured, tmp_path, witnesses))

        async def one_is_told_and_the_others_are_braked() -> bool:
            said = [(await at.liveness(n)).fencing for n in range(3)]
            braked = sum("the most without a person" in words for words in said)
            return bool(told(own_hands)) and braked == 2

        await until(one_is_told_and_the_others_are_braked, 60)
        assert len(set(told(own_hands))) == 1
