"""Outside systems that follow the event stream: their credentials, and their places in the streams.

A place dies with its stream. How far each reader has acknowledged is noted now and then, so that a rebuilt
stream goes on from there: a reader may see some facts twice, and misses none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors

from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.store import READERS
from volery.contracts.account import (
    CREATE_EVENT_READER,
    DELETE_EVENT_READER,
    LIST_EVENT_READERS,
    CreateEventReader,
    EventReader,
    EventReaderCredentials,
)
from volery.contracts.base import Done, Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import conflict, unavailable
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.connection import create_reader_consumers, delete_reader_consumers
from volery.runtime.core import shown_once
from volery.runtime.identity import Realm, mint_reader, reader_name
from volery.runtime.pages import page
from volery.runtime.relay import stream_name
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Taken

part = Part()


@part.answers(CREATE_EVENT_READER)
async def create_reader(inv: Inventory, ask: CreateEventReader, caller: Caller) -> EventReaderCredentials:
    name = reader_name(ask.name)
    config = inv.config
    if not config.secrets_dir:
        raise unavailable("this bus asks nobody who he is, so there are no credentials to give")
    minted = mint_reader(Realm.load(Path(config.secrets_dir)), ask.name)
    owners = tuple(dict.fromkeys(ask.owners)) or tuple(Owner)
    streams = {owner: stream_name(owner) for owner in owners}
    await create_reader_consumers(inv.core.bus.client.jetstream(timeout=5), ask.name, streams.values())
    now = utc_now()
    reader = EventReader(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=ask.name,
        owners=owners,
        public_key=minted.public_key,
    )
    answer = EventReaderCredentials(
        reader=reader,
        creds=minted.creds,
        servers=tuple(s for s in config.bus_public_servers.split(",") if s),
        consumers=dict.fromkeys(streams.values(), name),
        ca_pem=Path(config.pki_dir, "ca.pem").read_text() if config.pki_dir else "",
        inbox_prefix=f"_INBOX.{name}",
    )
    try:
        await inv.core.commit(READERS.insert(reader, Nothing()), caller=caller, answer=_shown(reader))
    except Taken:
        raise name_taken("event reader", ask.name) from None
    return answer


def _shown(reader: EventReader) -> bytes:
    """Kept instead of the answer: a reader of the database must not find the credentials there."""
    return shown_once(
        conflict(
            f"event reader {reader.name} was made under this Idempotency-Key; its credentials were shown then and are "
            "kept nowhere: delete it and make it again",
            reader_id=reader.id,
            rule="shown_once",
        )
    )


@part.answers(DELETE_EVENT_READER)
async def delete_reader(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    row = await READERS.get(inv.core.pool, ask.id)
    checks.revision(row.public, ask.if_revision, "event reader")
    await inv.revoke_keys([row.public.public_key], "reader")
    streams = [stream_name(owner) for owner in row.public.owners]
    await delete_reader_consumers(inv.core.bus.client.jetstream(timeout=5), row.public.name, streams)
    await inv.core.commit(
        READERS.delete(row), inv.store.forget_reader(row.public.name), caller=caller, answer=Done()
    )
    return Done()


@part.answers(LIST_EVENT_READERS)
async def list_readers(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, READERS, ask)


@part.every(5.0)
async def keep_places(inv: Inventory) -> None:
    """Note how far every reader is, and give back the places that a deleted stream took with it."""
    js = inv.core.bus.client.jetstream(timeout=5)
    for row in await READERS.where(inv.core.pool):
        known = await inv.store.reader_positions(row.public.name)
        for owner in row.public.owners:
            stream = stream_name(owner)
            try:
                info = await js.consumer_info(stream, reader_name(row.public.name))
            except nats.js.errors.NotFoundError:
                await _replace(inv, row.public.name, stream, known)
                continue
            except (nats.errors.Error, nats.js.errors.Error):
                return
            acknowledged = info.ack_floor.stream_seq if info.ack_floor else 0
            if acknowledged > known.get(stream, 0):
                await inv.store.note_reader(row.public.name, stream, acknowledged)


async def _replace(inv: Inventory, name: str, stream: str, known: dict[str, int]) -> None:
    try:
        js = inv.core.bus.client.jetstream(timeout=5)
        await create_reader_consumers(js, name, [stream], after=known)
    except nats.js.errors.NotFoundError:
        return
