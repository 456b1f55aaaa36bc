"""An outside reader follows its own consumer through the account READERS, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.errors import NoRespondersError

from tests.support.nats_realm import PATIENCE_SECONDS, Connect, Server, is_turned_away, streams
from volery.contracts.errors import Refused
from volery.runtime.connection import create_reader_consumers, delete_reader_consumers, revoke
from volery.runtime.identity import Realm, mint_reader
from volery.runtime.permissions import OWNERS, OWNERS_STREAMS, READERS_DOMAIN


async def test_a_reader_follows_its_own_consumer_and_nothing_else(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    minted = mint_reader(realm, "billing")
    path = tmp_path / "billing.creds"
    path.write_text(minted.creds)
    async with streams(OWNERS, connect) as owners:
        inventory = owners["inventory"].nc.jetstream()
        for number in range(5):
            await inventory.publish("fact.inventory.vm.changed", str(number).encode())
        await owners["storage"].nc.jetstream().publish("fact.storage.disk.changed", b"{}")
        gateway = (await connect("gateway")).nc.jetstream()
        for system in ("billing", "rival"):
            assert await create_reader_consumers(gateway, system, OWNERS_STREAMS)
        info = await gateway.consumer_info("FACTS_INVENTORY", minted.name)
        assert info.config.inactive_threshold == 7 * 86_400

        reader = await connect(minted.name, path)
        js = reader.nc.jetstream(domain=READERS_DOMAIN)
        pull = await js.pull_subscribe_bind(minted.name, stream="FACTS_INVENTORY")
        facts = await pull.fetch(5, timeout=PATIENCE_SECONDS)
        assert [fact.data for fact in facts] == [b"0", b"1", b"2", b"3", b"4"]
        for fact in facts:
            await fact.ack_sync(timeout=PATIENCE_SECONDS)
        info = await js.consumer_info("FACTS_INVENTORY", minted.name)
        assert (info.ack_floor.stream_seq, info.num_ack_pending) == (5, 0)
        other = await js.pull_subscribe_bind(minted.name, stream="FACTS_STORAGE")
        (fact,) = await other.fetch(1, timeout=PATIENCE_SECONDS)
        await fact.ack()
        assert not reader.errors

        for subject in (
            "$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.reader-rival",
            "$JS.volery.API.CONSUMER.INFO.FACTS_INVENTORY.reader-rival",
            "$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.inventory",
            f"$JS.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.INFO.FACTS_INVENTORY.{minted.name}", "$JS.volery.API.INFO",
            "$JS.ACK.FACTS_INVENTORY.reader-rival.1.1.1.1.1",
            f"$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_HOST.{minted.name}",
            "$JS.API.CONSUMER.CREATE.FACTS_INVENTORY", "$JS.API.INFO", "$JS.API.STREAM.NAMES",
            f"$JS.API.CONSUMER.CREATE.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.DURABLE.CREATE.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.DELETE.FACTS_INVENTORY.{minted.name}",
            "$JS.API.STREAM.INFO.FACTS_INVENTORY", "$JS.API.STREAM.MSG.GET.FACTS_INVENTORY",
            "$JS.API.STREAM.PURGE.FACTS_INVENTORY", "$JS.API.STREAM.DELETE.FACTS_INVENTORY",
            "fact.inventory.vm.changed", "inventory.vm.start", "host.x.order", "beat.host.x",
            "_INBOX.inventory.x", "_INBOX.reader-rival.x", "$SYS.REQ.SERVER.PING", "$SRV.PING", "x",
        ):  # fmt: skip
            assert await reader.publish_refused(subject), subject
        for subject in (
            ">", "fact.>", "fact.inventory.>", "inventory.>", "host.>", "beat.>", "_INBOX.>",
            "_INBOX.reader-rival.>", "$SYS.>", "$JS.>", "$JS.API.CONSUMER.MSG.NEXT.>",
        ):  # fmt: skip
            assert await reader.subscribe_refused(subject), subject

        # Its place is kept, and making it again doesn't move it.
        await create_reader_consumers(gateway, "billing", ["FACTS_INVENTORY"])
        await inventory.publish("fact.inventory.vm.changed", b"5")
        (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
        assert fact.data == b"5"

        claims = await connect("claims")
        await revoke(realm, claims.nc, [minted.public_key], role="reader")
        await asyncio.wait_for(reader.closed.wait(), PATIENCE_SECONDS)
        assert await is_turned_away(server, path, minted.name)
        await delete_reader_consumers(gateway, "billing", OWNERS_STREAMS)
        await delete_reader_consumers(gateway, "billing", OWNERS_STREAMS)


async def test_a_reader_sees_the_chosen_streams_from_the_chosen_place(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    minted = mint_reader(realm, "audit")
    path = tmp_path / "audit.creds"
    path.write_text(minted.creds)
    async with streams(("inventory", "ha"), connect) as owners:
        for subject in ("vm.changed", "host.changed", "vm.changed", "host.changed"):
            await owners["inventory"].nc.jetstream().publish(f"fact.inventory.{subject}", b"{}")
        await create_reader_consumers(
            owners["ha"].nc.jetstream(), "audit", ["FACTS_INVENTORY"],
            after={"FACTS_INVENTORY": 2}, subjects=("fact.inventory.vm.>",),
        )  # fmt: skip
        reader = await connect(minted.name, path)
        pull = await reader.nc.jetstream(domain=READERS_DOMAIN).pull_subscribe_bind(
            minted.name, stream="FACTS_INVENTORY"
        )
        (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
        assert (fact.metadata.sequence.stream, fact.metadata.num_pending) == (3, 0)
        subject = f"$JS.volery.API.CONSUMER.INFO.FACTS_HA.{minted.name}"
        answer = await _answer(reader.nc, subject)
        assert answer is None or "not found" in answer["error"]["description"]


async def _answer(nc: Client, subject: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads((await nc.request(subject, b"", timeout=PATIENCE_SECONDS)).data))
    except NoRespondersError:
        return None


@pytest.mark.parametrize("system", ["", "Billing", "a.b", "*", "-a", "a-", "a b", "x" * 64])
def test_a_systems_name_is_checked(system: str, realm: Realm) -> None:
    with pytest.raises(Refused, match="outside system"):
        mint_reader(realm, system)
