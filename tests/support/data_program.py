"""The agent's data server as a process of its own, with one upload opened: for tests that kill it.

`python -m tests.support.data_program STATE_DIR`, an OpenTransfer as JSON on standard input; says its
TransferOpened on one line and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from host_agent import data_server, transfers
from tests.support.agent_host import make_host, running
from volery.contracts.volume_orders import OpenTransfer


async def main() -> None:
    host = make_host(Path(sys.argv[1]))
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=OpenTransfer)
    opened = await transfers.open_transfer(host, order, running())
    serving = asyncio.create_task(data_server.serve(host))
    sys.stdout.buffer.write(msgspec.json.encode(opened) + b"\n")
    sys.stdout.flush()
    await serving


if __name__ == "__main__":
    asyncio.run(main())
