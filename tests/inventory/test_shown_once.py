"""Secrets that are shown once: a repeat is told so, and the database doesn't have them."""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg
import pytest

from services.inventory.service import service
from tests.support.plane import Plane, default_cluster, plane_servers, running_plane
from volery.contracts.account import CREATE_EVENT_READER, CreateEventReader
from volery.contracts.base import Call, Owner
from volery.contracts.enrolment import read_token
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import CREATE_HOST, RENEW_HOST_TOKEN, CreateHost, RenewHostToken
from volery.runtime.bus import Bus, Caller


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


async def repeat_is_refused(bus: Bus, call: Call, question: object, caller: Caller) -> str:  # type: ignore[type-arg]
    with pytest.raises(Refused) as refused:
        await bus.ask(call, question, caller)
    assert refused.value.kind is Kind.CONFLICT
    assert refused.value.details["rule"] == "shown_once"
    return refused.value.message


async def everything(plane: Plane) -> str:
    """Every row of inventory's schema, as text."""
    dsn = plane.postgres.dsn
    connection = await asyncpg.connect(dsn, database="volery")
    try:
        tables = await connection.fetch(
            "select quote_ident(table_name) as name from information_schema.tables where table_schema = 'inventory'"
        )
        rows = [await connection.fetch(f"select * from inventory.{t['name']}") for t in tables]
    finally:
        await connection.close()
    return "\n".join(str(dict(row)) for found in rows for row in found)


async def test_secrets_are_shown_once_and_kept_nowhere(plane: Plane) -> None:
    def key(name: str) -> Caller:
        return Caller("user:1", name, "hash")

    async with running_plane(plane, service) as bus:
        cluster = await default_cluster(bus)
        create = CreateHost(name="h1", cluster_id=cluster.id)
        first = await bus.ask(CREATE_HOST, create, key("a"))
        assert "volery host token h1" in await repeat_is_refused(bus, CREATE_HOST, create, key("a"))
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_HOST, create, Caller("user:1", "a", "another body"))
        assert refused.value.kind is Kind.MISMATCH
        renew = RenewHostToken(id=first.host.id)
        second = await bus.ask(RENEW_HOST_TOKEN, renew, key("b"))
        await repeat_is_refused(bus, RENEW_HOST_TOKEN, renew, key("b"))
        third = await bus.ask(RENEW_HOST_TOKEN, renew, key("c"))
        again = CreateEventReader(name="siem", owners=(Owner.INVENTORY,))
        reader = await bus.ask(CREATE_EVENT_READER, again, key("d"))
        assert "delete it" in await repeat_is_refused(bus, CREATE_EVENT_READER, again, key("d"))
        kept = await everything(plane)
        assert first.host.id in kept
        for made in (first, second, third):
            assert made.enrolment_token not in kept
            assert read_token(made.enrolment_token).secret not in kept
        seed = next(line for line in reader.creds.splitlines() if line.startswith("SU"))
        assert seed not in kept
