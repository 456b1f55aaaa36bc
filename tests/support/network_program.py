"""Runs one action on a host's networks in the network namespace that it is started in.

`python -m tests.support.network_program VERB STATE_DIR [HOST:PORT [LIBVIRT_URI]]`, an order as JSON on standard
input for `apply`. HOST:PORT is where the control plane listens: reachable is what accepts a connection there.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from host_agent import network, network_watch
from host_agent.action import Host
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import make_host, running
from volery.contracts.errors import Refused
from volery.contracts.network_orders import ApplyNetworks

CONNECT_SECONDS = 0.5


def reachable_at(address: str) -> Any:
    host, _, port = address.rpartition(":")

    async def reachable() -> bool:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    return reachable


async def act(host: Host, verb: str) -> object:
    if verb == "apply":
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=ApplyNetworks)
        return await network.apply(host, order, running())
    if verb == "restore":
        return await network.restore(host)
    if verb == "report":
        return await network.report(host)
    if verb == "watch":
        return await changed(host)
    if verb == "features":
        return await network.features()
    return await network.nics()


async def changed(host: Host) -> str:
    """Returns when the watch has seen a change; says when it has begun."""
    seen = asyncio.Event()
    quick = Host(
        msgspec.structs.replace(host.config, network_check_seconds=0.05), host.hypervisor, host.tickets, ""
    )
    watching = asyncio.create_task(network_watch.watch(quick, seen.set))
    await asyncio.sleep(0.5)  # its first look
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    async with asyncio.timeout(30):
        await seen.wait()
    watching.cancel()
    return "changed"


async def main() -> None:
    verb, state_dir, *more = sys.argv[1:]
    reachable = reachable_at(more[0]) if more and more[0] else None
    if len(more) < 2:
        await say(make_host(Path(state_dir), reachable=reachable), verb)
        return
    host = make_host(Path(state_dir), libvirt_uri=more[1])
    hypervisor = Hypervisor(host.config)
    await hypervisor.start()
    try:
        await hypervisor.wait_connected(20)
        await say(make_host(Path(state_dir), hypervisor, reachable, libvirt_uri=more[1]), verb)
    finally:
        await hypervisor.close()


async def say(host: Host, verb: str) -> None:
    try:
        answer: object = {"ok": await act(host, verb)}
    except Refused as refused:
        answer = {"refused": refused.problem()}
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    asyncio.run(main())
