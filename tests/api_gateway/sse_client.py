"""A client of the event stream that remembers where it is, as a browser does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec


@dataclass
class Received:
    cursor: str
    type: str
    event: dict[str, Any]


class Ended(Exception):
    """The server closed the stream."""


class Follower:
    """`cursor` is the last id that was seen, also in heartbeats."""

    def __init__(self, http: httpx.AsyncClient, cursor: str = "", **query: str) -> None:
        self.http = http
        self.cursor = cursor
        self.query = query

    async def events(self) -> AsyncIterator[Received | None]:
        """Events; None for a heartbeat and for the beginning. Raises Ended, httpx.HTTPStatusError."""
        headers = {"last-event-id": self.cursor} if self.cursor else {}
        async with self.http.stream(
            "GET", "/events", params=self.query, headers=headers, timeout=30
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                answer.raise_for_status()
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                    continue
                self.cursor = fields.get("id", self.cursor)
                if "data" in fields:
                    event = msgspec.json.decode(fields["data"])
                    yield Received(self.cursor, fields["event"], event)
                else:
                    yield None
                fields = {}
        raise Ended
