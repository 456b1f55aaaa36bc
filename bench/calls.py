"""What the contract layer costs a call: against nats-py's own request and reply on equal connections."""

from __future__ import annotations

from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.load import rate
from bench.rows import Line, at_least, in_turn
from bench.world import World
from volery.contracts.base import Call
from volery.contracts.cluster import GetById
from volery.contracts.ids import new_id
from volery.runtime.bus import Answers, Bus, Caller, connect, open_bus

SECONDS = 1.0
ECHO = Call("inventory.bench.echo", GetById, GetById)
BARE = "inventory.bench.bare"


async def call(world: World) -> list[Line]:
    """The same document there and back; both ends of both sides in this one process."""
    there = await world.installation()
    asked = GetById(id=new_id())
    plain = ECHO.encode(asked)

    async def echo(question: GetById, _caller: Caller) -> GetById:
        return question

    async def bare_echo(message: Msg) -> None:
        await message.respond(message.data)

    async with open_bus(there.bus, "inventory") as server, open_bus(there.bus, "gateway") as asking:
        answers = Answers(server)
        await answers.open({ECHO.subject: (ECHO, echo)})
        bare_server, bare_client = (
            await connect(there.bus, "inventory"),
            await connect(there.bus, "gateway"),
        )
        await bare_server.subscribe(BARE, cb=bare_echo)
        await bare_server.flush()
        bus = Bus(asking.client, "gateway")

        async def ask(_number: int) -> None:
            await bus.ask(ECHO, asked)

        async def bare(_number: int) -> None:
            # The connection is ours, since nats-py can't begin with TLS; the way to ask is nats-py's own.
            await Client._request_new_style(bare_client, BARE, plain, timeout=10)

        found = []
        for callers in (1, 32):

            async def ours(callers: int = callers) -> float:
                return await rate(ask, callers, SECONDS)

            async def theirs(callers: int = callers) -> float:
                return await rate(bare, callers, SECONDS)

            pairs = await in_turn(ours, theirs)
            name = f"call through the contract layer, {callers} caller{'s' * (callers > 1)}"
            found.append(at_least(name, pairs, 0.8, "calls/s", "theirs: bare nats-py"))
        await answers.close()
        await bare_client.close()
        await bare_server.close()
    return found
