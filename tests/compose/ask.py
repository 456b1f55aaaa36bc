"""Runs in the gateway's container: what the NATS servers say of themselves, and how often each stream is kept."""

import asyncio
import dataclasses
import json
import sys

from volery.runtime.bus import connect
from volery.runtime.config import BusConfig, read
from volery.runtime.permissions import STREAMS
from volery.runtime.readiness import ask


async def main() -> None:
    config = read("VOLERY_BUS_", BusConfig)
    system, own = await connect(config, "sys"), await connect(config, "gateway")
    states = [dataclasses.asdict(state) for state in await ask(system)]
    replicas = {s: (await own.jetstream().stream_info(s)).config.num_replicas for s in STREAMS}
    await system.close()
    await own.close()
    json.dump([states, replicas], sys.stdout)


asyncio.run(main())
