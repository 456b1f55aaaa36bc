"""What administrators ask of the installation itself: its health, its streams, hosts that a restore waits for."""

from __future__ import annotations

import asyncio

import msgspec

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange
from api_gateway.question import SAFE_ID, decoded_body
from api_gateway.strict import STORABLE_TEXT
from volery.contracts.base import Call, Done, Owner, encode
from volery.contracts.errors import Kind, Refused, not_found
from volery.contracts.health import EXCUSE_HOST, GET_HEALTH, AskHealth, ExcuseHost, Health
from volery.contracts.streams import REBUILD_STREAM, RebuildStream
from volery.runtime.bus import Caller

HEALTH_SECONDS = 1.5


class ServiceHealth(msgspec.Struct):
    """One service, as far as it answers."""

    service: Owner
    answers: bool
    health: Health | None = None


class Healths(msgspec.Struct):
    items: list[ServiceHealth]


class Excuse(msgspec.Struct, forbid_unknown_fields=True):
    """A person says that this host is dead and nothing of it runs any more."""

    confirm: STORABLE_TEXT
    """The host's id again, typed."""


_EXCUSE = msgspec.json.Decoder(Excuse)
_HEALTH = msgspec.json.Decoder(Health)


async def ask_health(desk: Desk, owner: Owner) -> ServiceHealth:
    """Never raises: a service that doesn't answer is the answer."""
    call = GET_HEALTH[owner]
    question, caller = call.encode(AskHealth()), Caller("service:gateway")
    try:
        raw = await desk.bus.ask_raw(call.subject, question, caller, HEALTH_SECONDS, again=False)
    except Refused:
        return ServiceHealth(owner, answers=False)
    return ServiceHealth(owner, answers=True, health=_HEALTH.decode(raw))


async def health(desk: Desk, http: Exchange) -> None:
    """GET /health"""
    http.refuse_query()
    found = await asyncio.gather(*(ask_health(desk, owner) for owner in Owner))
    await http.answer(200, encode(Healths(list(found))))


async def rebuild(desk: Desk, http: Exchange) -> None:
    """POST /streams/{owner}/rebuild"""
    http.refuse_query()
    name = http.parameters["owner"]
    if name not in set(Owner):
        raise not_found("stream", f"of {name[:80]}: there is one for each of {', '.join(Owner)}")
    call = REBUILD_STREAM[Owner(name)]
    await desk.ask(call, call.encode(RebuildStream()), Caller(http.who))
    await http.answer(204)


async def excuse(desk: Desk, http: Exchange) -> None:
    """POST /hosts/{id}/excuse: told to every service that waits for this host."""
    http.refuse_query()
    host_id = http.parameters["id"]
    if not SAFE_ID.fullmatch(host_id):
        raise not_found("host", host_id[:80])
    _, said = await decoded_body(http, _EXCUSE, desk.config.body_limit_bytes)
    found = await asyncio.gather(*(ask_health(desk, owner) for owner in Owner))
    if silent := [str(one.service) for one in found if not one.answers]:
        raise Refused(
            Kind.UNAVAILABLE, f"{', '.join(silent)} don't answer: try again when every service does"
        )
    waiting = [one.service for one in found if one.health and host_id in one.health.waits_for_hosts]
    if not waiting:
        raise Refused(
            Kind.CONFLICT, f"no service waits for host {host_id}: there is nothing to excuse it from"
        )
    question = ExcuseHost(host_id=host_id, confirm=said.confirm)
    calls: list[Call[ExcuseHost, Done]] = [EXCUSE_HOST[owner] for owner in waiting]
    await asyncio.gather(*(desk.ask(call, call.encode(question), Caller(http.who)) for call in calls))
    await http.answer(204)
