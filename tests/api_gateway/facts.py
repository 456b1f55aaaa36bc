"""Facts as an owner's relay would publish them, for a gateway that follows."""

from __future__ import annotations

from typing import Any

import msgspec

from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.relay import stream_name

HISTORY = "abcdef012345"


async def facts_of(bus: Bus, owner: Owner, history: str = HISTORY) -> None:
    """An empty stream for this owner."""
    await bus.client.jetstream().add_stream(
        name=stream_name(owner), subjects=[f"fact.{owner}.>"], metadata={"history": history}
    )


async def tell(bus: Bus, position: int, subject: str, data: Any, history: str = HISTORY) -> None:
    """One fact at its position."""
    _, owner, noun, object_id, verb = subject.split(".")
    event = {
        "specversion": "1.0",
        "id": f"{history}.{owner}.{position}",
        "sequence": str(position),
        "type": f"dev.volery.{owner}.{noun}.{verb}",
        "subject": f"{noun}/{object_id}",
        "data": data,
    }
    headers = {"Nats-Expected-Last-Sequence": str(position - 1)}
    await bus.client.jetstream().publish(subject, msgspec.json.encode(event), headers=headers)
