"""The hosts' data servers as the gateway reaches them: by TLS that Volery's own authority vouches for."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import msgspec

from api_gateway.config import GatewayConfig
from volery.contracts.errors import Kind, Problem, Refused


async def tls(config: GatewayConfig) -> ssl.SSLContext | None:
    """Made for each use, so that a renewed authority needs no restart; None without an authority (tests)."""
    if not config.ca:
        return None
    return await asyncio.to_thread(ssl.create_default_context, cafile=config.ca)


def unreachable(what: str, address: str, error: object) -> Refused:
    return Refused(
        Kind.UNAVAILABLE,
        f"the host that has {what} can't be reached at {address} ({error}): check that it is up, then try again",
        data_address=address,
    )


def refusal(what: str, status: int, body: bytes) -> Refused:
    """What a data server said, as our own refusal."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        return Refused(
            Kind.UNAVAILABLE, f"the host that has {what} answered {status} without a reason; try again"
        )
    details: dict[str, Any] = problem.details
    return Refused(problem.kind, problem.message, **details)
