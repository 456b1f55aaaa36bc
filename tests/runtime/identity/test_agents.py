"""What a host's agent can do on a real server, and that it can do nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from tests.support.nats_realm import PATIENCE_SECONDS, Connect, enrol, streams, witness_creds
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.runtime.connection import settle
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.permissions import COMMANDERS, LISTENERS
from volery.runtime.signing import Key, Verifier


async def test_an_agent_can_do_its_work(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent = await connect(host_id, creds)
    async with streams(("host",), connect) as owners:
        ack = await agent.nc.jetstream().publish(f"fact.host.{host_id}.inventory.reported", b"{}")
        assert (ack.stream, ack.seq) == ("FACTS_HOST", 1)
        heard = {}
        for listener in LISTENERS:
            user = owners["host"] if listener == "inventory" else await connect(listener)
            heard[listener] = [await user.nc.subscribe(s) for s in ("beat.host.*", "metrics.host.*")]
            await settle(user.nc)
        for subject in (f"beat.host.{host_id}", f"metrics.host.{host_id}"):
            await agent.nc.publish(subject, subject.encode())
        for subscriptions in heard.values():
            for subscription in subscriptions:
                message = await subscription.next_msg(PATIENCE_SECONDS)
                assert message.subject == message.data.decode()
        assert not agent.errors


@pytest.mark.parametrize("word", ["order", "cancel", "committed", "report", "ask", "ask.describe"])
async def test_owners_that_command_reach_the_agent_and_are_answered(
    word: str, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent = await connect(host_id, creds)

    async def answer(message: Msg) -> None:
        await message.respond(b"journaled")

    await agent.nc.subscribe(f"host.{host_id}.>", cb=answer)
    await settle(agent.nc)
    for owner in COMMANDERS:
        user = await connect(owner)
        reply = await user.nc.request(f"host.{host_id}.{word}", b"", timeout=PATIENCE_SECONDS)
        assert reply.data == b"journaled"
    assert not agent.errors


async def test_an_agent_answers_once(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent, inventory = await connect(host_id, creds), await connect("inventory")
    orders = await agent.nc.subscribe(f"host.{host_id}.order")
    inbox = inventory.nc.new_inbox()
    answers = await inventory.nc.subscribe(inbox)
    await asyncio.gather(settle(agent.nc), settle(inventory.nc))
    await inventory.nc.publish(f"host.{host_id}.order", b"", reply=inbox)
    order = await orders.next_msg(PATIENCE_SECONDS)
    assert not await agent.refuses(order.respond(b"first"))
    assert await agent.refuses(order.respond(b"second"))
    assert (await answers.next_msg(PATIENCE_SECONDS)).data == b"first"
    assert answers.pending_msgs == 0


async def test_an_acknowledgement_steered_to_another_host_is_no_order(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    """The server checks no reply subject: this arrives, and only the signature tells it from an order."""
    (a, a_creds, _), (b, b_creds, _) = (enrol(realm, tmp_path) for _ in range(2))
    attacker, victim = await connect(a, a_creds), await connect(b, b_creds)
    orders = await victim.nc.subscribe(f"host.{b}.order")
    await settle(victim.nc)
    async with streams(("host",), connect):
        await attacker.nc.publish(f"fact.host.{a}.x", b"{}", reply=f"host.{b}.order")
        message = await orders.next_msg(PATIENCE_SECONDS)
        assert b"FACTS_HOST" in message.data
        header = (message.headers or {}).get("Volery-Signature", "")
        assert Verifier(realm.order_keys()).owner_of(message.subject, message.data, header) is None


async def test_an_agent_can_do_nothing_else(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    other = new_id()
    agent = await connect(host_id, creds)
    witness = await connect("witness", await witness_creds(realm, tmp_path))
    everything = await witness.nc.subscribe(">")
    await settle(witness.nc)
    async with streams(("host", "inventory"), connect):
        publishes = (
            f"fact.host.{other}.inventory.reported", "fact.host", f"beat.host.{other}",
            f"metrics.host.{other}", f"host.{host_id}.order", f"host.{other}.order",
            f"host.{other}.committed", "inventory.vm.start", "fact.inventory.vm.changed",
            "relay.inventory.wake", "$SRV.PING", "_INBOX.inventory.x", f"_INBOX.{other}.x",
            f"_INBOX.{host_id}.x", "$JS.API.INFO", "$JS.API.STREAM.INFO.FACTS_HOST",
            "$JS.API.STREAM.DELETE.FACTS_HOST", "$JS.API.STREAM.PURGE.FACTS_HOST",
            "$JS.API.CONSUMER.CREATE.FACTS_HOST", "$JS.API.CONSUMER.MSG.NEXT.FACTS_HOST.x",
            "$JS.API.STREAM.MSG.GET.FACTS_INVENTORY", "$JS.ACK.FACTS_HOST.x.1.1.1.1.1",
            "$SYS.REQ.SERVER.PING", "$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.USER.INFO", "anything",
        )  # fmt: skip
        for subject in publishes:
            assert await agent.publish_refused(subject), f"published {subject}"
        subscriptions = (
            ">", "*", "host.>", "host.*.order", f"host.{other}.>", f"host.{other}.order", "fact.>",
            f"fact.host.{host_id}.>", f"beat.host.{host_id}", "beat.>", "metrics.>", "inventory.>",
            "inventory.vm.start", "_INBOX.>", "_INBOX.*.>", "_INBOX.inventory.>", f"_INBOX.{other}.>",
            "$SYS.>", "$SYS.ACCOUNT.*.DISCONNECT", "$JS.>", "$SRV.>", "relay.>",
        )  # fmt: skip
        for subject in subscriptions:
            assert await agent.subscribe_refused(subject), f"subscribed {subject}"
        await settle(witness.nc)
        heard = {(await everything.next_msg()).subject for _ in range(everything.pending_msgs)}
        assert not heard & set(publishes)
    assert agent.nc.is_connected


async def test_two_agents_stand_side_by_side(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    (a, a_creds, _), (b, b_creds, _) = enrol(realm, tmp_path), enrol(realm, tmp_path)
    one, two = await connect(a, a_creds), await connect(b, b_creds)
    assert not await one.publish_refused(f"fact.host.{a}.x")
    assert await one.publish_refused(f"fact.host.{b}.x")
    assert not await two.publish_refused(f"fact.host.{b}.x")
    assert await two.publish_refused(f"fact.host.{a}.x")
    assert not await two.subscribe_refused(f"host.{b}.order")
    assert await two.subscribe_refused(f"host.{a}.order")


@pytest.mark.parametrize(
    "host_id",
    [
        "",
        "*",
        ">",
        "a.b",
        "inventory",
        "gateway",
        "{{name()}}",
        "h 1",
        "01A22853-7FD2-76F8-822C-510507289FBF",
    ],
)
def test_a_host_id_that_could_widen_permissions_is_refused(host_id: str, realm: Realm) -> None:
    with pytest.raises(Refused, match="not a host id"):
        mint_agent(realm, host_id, Key.new("user").public)


def test_a_key_that_is_no_agents_is_refused(realm: Realm) -> None:
    for key in ("", "UABC", Key.new("account").public, Key.new("user").seed):
        with pytest.raises(Refused, match="nkey user"):
            mint_agent(realm, new_id(), key)
    with pytest.raises(Refused, match="belongs to a service"):
        mint_agent(realm, new_id(), realm.users["inventory"])
