"""The connection under an answer that goes on: an event is written to a thousand clients in one loop.

ASGI knows only `await send(...)`, for which each client's task must be woken: half of what an event costs. uvicorn's own
object behind `send` has the transport, and says whether the client takes what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from api_gateway.exchange import Send


@dataclass(frozen=True, slots=True)
class Wire:
    cycle: RequestResponseCycle

    def takes(self) -> bool:
        """Whether the client is there and has taken most of what was written before."""
        cycle = self.cycle
        return not (cycle.disconnected or cycle.response_complete or cycle.flow.write_paused)

    def write(self, body: bytes) -> None:
        """A part of the answer's body. Call it only when `takes()`."""
        self.cycle.transport.write(_chunk(body))


def wire_of(send: Send) -> Wire | None:
    """The wire of an answer that was begun without a length; None where something else than uvicorn is behind it."""
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle) and cycle.response_started and cycle.chunked_encoding:
        return Wire(cycle)
    return None


@lru_cache(maxsize=4)
def _chunk(body: bytes) -> bytes:
    """As HTTP/1.1 frames it; the same for everybody who gets the same bytes."""
    return b"%x\r\n%b\r\n" % (len(body), body)
