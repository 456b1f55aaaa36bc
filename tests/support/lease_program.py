"""The agent's part for leases and domains on a lab host: orders from the command line, the last answer on stdout.

`python -m tests.support.lease_program STATE_DIR WATCHDOG_CLASS KIND BODY [KIND BODY …]`, up to the first refusal,
which is `{"refused": kind, "message": …}`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec

from host_agent import domains, leases, storage
from host_agent.action import Host, Running
from host_agent.config import AgentConfig
from host_agent.hypervisor import Hypervisor
from host_agent.tickets import Tickets
from volery.contracts.base import encode
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id

ACTIONS = {one.order.kind: one for one in (*storage.ACTIONS, *leases.ACTIONS, *domains.ACTIONS)}


async def main(state_dir: str, watchdog_class: str, *orders: str) -> None:
    config = AgentConfig(
        state_dir=state_dir,
        installation="test01",
        hypervisor="qemu",
        watchdog_class_path=watchdog_class,
    )
    hypervisor = Hypervisor(config)
    await hypervisor.start()
    host = Host(config, hypervisor, Tickets(), new_id())
    try:
        await hypervisor.wait_connected(30)
        for kind, body in zip(orders[::2], orders[1::2], strict=True):
            answer = encode(await carry_out(host, kind, body))
    except Refused as refused:
        answer = encode({"refused": refused.kind.value, "message": refused.message})
    finally:
        await hypervisor.close()
    sys.stdout.write(answer.decode() + "\n")


async def carry_out(host: Host, kind: str, body: str) -> Any:
    action = ACTIONS[kind]
    running = Running(
        order_id=new_id(),
        owner="storage",
        object_id=new_id(),
        epoch=1,
        order_seq=1,
        deadline_seconds=300,
        resumed=False,
        progress=lambda percent, details: None,
    )
    return await action.run(host, msgspec.json.decode(body, type=action.order.question), running)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
