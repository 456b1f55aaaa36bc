"""Logging in and out. Attempts are counted, since checking a password costs inventory much CPU on purpose."""

from __future__ import annotations

import msgspec

from api_gateway.desk import Desk
from api_gateway.exchange import ANONYMOUS, Exchange
from api_gateway.question import decoded_body
from api_gateway.strict import strict_struct
from volery.contracts.account import DELETE_TOKEN, LOGIN, IssuedToken, Login
from volery.contracts.base import encode
from volery.contracts.ids import new_id
from volery.runtime.bus import Caller
from volery.runtime.core import body_hash

_LOGIN = msgspec.json.Decoder(strict_struct(Login))


async def log_in(desk: Desk, http: Exchange) -> None:
    """POST /sessions"""
    body, login = await decoded_body(http, _LOGIN, desk.config.body_limit_bytes)
    desk.attempts.take(f"address:{http.address}", f"name:{login.name}")
    answer = await desk.ask(LOGIN, body, Caller(ANONYMOUS))
    issued = msgspec.json.decode(answer, type=IssuedToken)
    location = f"/api/v1/tokens/{issued.token.id}".encode()
    await http.answer(201, answer, [(b"location", location), (b"cache-control", b"no-store")])


async def current(desk: Desk, http: Exchange) -> None:
    """GET /sessions/current: who the token says I am."""
    await http.answer(200, encode(http.principal))


async def log_out(desk: Desk, http: Exchange) -> None:
    """DELETE /sessions/current: the token is worth nothing from now on."""
    principal = http.principal
    assert principal is not None
    question = encode({"id": principal.token_id})
    caller = Caller(principal.principal, new_id(), body_hash(b"DELETE", question))
    await desk.ask(DELETE_TOKEN, question, caller)
    desk.door.evict(lambda p: p.token_id == principal.token_id)
    await http.answer(204)
