"""Runs in the gateway's container: what the NATS servers say of themselves, and how often each stream is kept.

A cluster that elects a leader answers nothing for a moment, or not with all of its servers: then it is asked again.
"""

import asyncio
import dataclasses
import json
import sys

import nats.errors
import nats.js.errors

from volery.runtime.bus import connect
from volery.runtime.config import BusConfig, read
from volery.runtime.permissions import STREAMS
from volery.runtime.readiness import ask

SECONDS = 60.0


async def main() -> None:
    config = read("VOLERY_BUS_", BusConfig)
    system, own = await connect(config, "sys"), await connect(config, "gateway")
    async with asyncio.timeout(SECONDS):
        while len(states := await ask(system)) < max((s.cluster_size for s in states), default=1):
            await asyncio.sleep(0.2)
        replicas = {stream: await kept(own.jetstream(), stream) for stream in STREAMS}
    await system.close()
    await own.close()
    json.dump([[dataclasses.asdict(state) for state in states], replicas], sys.stdout)


async def kept(js: nats.js.JetStreamContext, stream: str) -> int:
    while True:
        try:
            return (await js.stream_info(stream)).config.num_replicas or 1
        except (nats.errors.Error, nats.js.errors.Error) as error:
            print(f"{stream} is asked again: {error!r}", file=sys.stderr)
            await asyncio.sleep(0.2)


asyncio.run(main())
