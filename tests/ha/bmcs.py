"""BMCs that answer by a script, through executors that speak the contract on a real bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from volery.contracts.base import encode
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import AskPower, PowerAction, PowerAnswer, PowerState
from volery.runtime.bus import ERROR_HEADER

AGENT = "fence_scripted"
"""Installed nowhere: ha can't run it itself."""
PASSWORD = "bmc-secret-word"


@dataclass
class Bmc:
    """Of one machine, at one address."""

    identity: str
    power: PowerState = PowerState.ON
    obeys: bool = True
    answers: bool = True
    loses: set[PowerAction] = field(default_factory=set)
    """Actions that it does, but whose answer gets lost."""
    broken: set[PowerAction] = field(default_factory=set)
    """Actions that it does not do, as it says."""
    held: dict[PowerAction, asyncio.Event] = field(default_factory=dict)
    """Actions that it answers once this is set."""
    asked: list[AskPower] = field(default_factory=list)

    def did(self, action: PowerAction) -> int:
        return sum(ask.action is action for ask in self.asked)

    def act(self, ask: AskPower) -> PowerAnswer:
        self.asked.append(ask)
        if not self.answers or ask.action in self.broken:
            return PowerAnswer(
                ask_id=ask.ask_id, action=ask.action, words="connection timed out", exit_code=1
            )
        if ask.action in (PowerAction.ON, PowerAction.OFF) and self.obeys:
            self.power = PowerState(ask.action)
        identity = self.identity if ask.action is PowerAction.IDENTITY else ""
        return PowerAnswer(
            ask_id=ask.ask_id, action=ask.action, state=self.power, identity=identity, words="ok", exit_code=0
        )


@dataclass
class Executors:
    """Hosts that run fence agents, as far as ha hears of them."""

    bmcs: dict[str, Bmc] = field(default_factory=dict)
    """By address."""
    highest_token: int = 0
    refused: list[Refused] = field(default_factory=list)
    boots: dict[str, str] = field(default_factory=dict)

    def check(self, ask: AskPower) -> None:
        if ask.fencing_token < self.highest_token:
            raise Refused(Kind.CONFLICT, "another ha leads")
        self.highest_token = ask.fencing_token
        if self.boots.get(ask.host_id) == ask.target_boot_id:
            raise Refused(Kind.CONFLICT, "that is myself")
        if ask.secrets.get("password") != PASSWORD:
            raise Refused(Kind.INVALID, "wrong password")


@asynccontextmanager
async def executing(client: Client, *host_ids: str) -> AsyncIterator[Executors]:
    made = Executors()
    answering: set[asyncio.Task[None]] = set()

    async def heard(message: Msg) -> None:
        task = asyncio.create_task(answer_to(message))
        answering.add(task)
        task.add_done_callback(answering.discard)

    async def answer_to(message: Msg) -> None:
        ask = msgspec.json.decode(message.data, type=AskPower)
        try:
            made.check(ask)
        except Refused as refused:
            made.refused.append(refused)
            await client.publish(
                message.reply, encode(refused.problem()), headers={ERROR_HEADER: refused.kind}
            )
            return
        bmc = made.bmcs[ask.device.address]
        answer = bmc.act(ask)
        if (held := bmc.held.get(ask.action)) is not None:
            await held.wait()
        if ask.action not in bmc.loses:
            await client.publish(message.reply, encode(answer))

    subscriptions = [await client.subscribe(f"host.{host_id}.power", cb=heard) for host_id in host_ids]
    await client.flush()
    try:
        yield made
    finally:
        for subscription in subscriptions:
            await subscription.unsubscribe()
        for task in answering:
            task.cancel()
