"""What programs and system users can do on a real server, and what they can not."""

from __future__ import annotations

import json
from pathlib import Path

import nats
import nats.micro
import pytest

from tests.support.nats_realm import PATIENCE_SECONDS, Connect, Server, enrol, open_user, streams
from volery.contracts.ids import new_id
from volery.runtime.connection import read_presence, settle
from volery.runtime.identity import Realm
from volery.runtime.permissions import COMMANDERS, LISTENERS, OWNERS, SERVICES, stream_of


@pytest.mark.parametrize("owner", OWNERS)
async def test_an_owner_answers_calls_keeps_its_stream_and_reads_the_others(
    owner: str, realm: Realm, connect: Connect
) -> None:
    me, gateway = await connect(owner), await connect("gateway")
    neighbour = OWNERS[OWNERS.index(owner) - 1]

    async def answer(request: nats.micro.Request) -> None:
        await request.respond(b"answer to " + request.data)

    service = await nats.micro.add_service(me.nc, name=owner, version="1.0.0")
    await service.add_endpoint(name="start", subject=f"{owner}.thing.start", handler=answer)
    await settle(me.nc)
    for asker in (gateway, await connect(neighbour), await connect("setup")):
        reply = await asker.nc.request(f"{owner}.thing.start", b"x", timeout=PATIENCE_SECONDS)
        assert reply.data == b"answer to x"
        assert (await asker.nc.request(f"$SRV.PING.{owner}", b"", timeout=5)).data
    await service.stop()

    async with streams((owner, neighbour), connect) as users:
        js = users[owner].nc.jetstream()
        ack = await js.publish(f"fact.{owner}.thing.changed", b"{}")
        assert ack.seq == 1
        assert (await js.stream_info(stream_of(owner))).state.last_seq == 1
        for reader in (users[neighbour], gateway):
            pull = await reader.nc.jetstream().pull_subscribe(
                "", durable=f"{neighbour}-x", stream=stream_of(owner)
            )
            (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
            await fact.nak()
        ordered = await gateway.nc.jetstream().subscribe(
            f"fact.{owner}.>", stream=stream_of(owner), ordered_consumer=True
        )
        assert (await ordered.next_msg(PATIENCE_SECONDS)).subject == f"fact.{owner}.thing.changed"
        await js.purge_stream(stream_of(owner))
        me_and_others = [me, gateway, *users.values()]
        assert [user.errors for user in me_and_others] == [[] for _ in me_and_others]


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_can_not_do_another_ones_work(service: str, connect: Connect) -> None:
    me = await connect(service)
    others = [owner for owner in OWNERS if owner != service]
    publishes = [f"fact.{o}.thing.changed" for o in (*others, "host.x")]
    publishes += [
        f"$JS.API.STREAM.{verb}.{stream_of(o)}"
        for o in (*others, *([] if service == "inventory" else ["host"]), "new")
        for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE")
    ]
    publishes += ["$SYS.REQ.SERVER.PING", "$SYS.REQ.CLAIMS.UPDATE", "$JS.API.STREAM.CREATE.X"]
    publishes += ["beat.host.x", "metrics.host.x", "_INBOX.x.y", f"_INBOX.{new_id()}.y", "anything"]
    publishes += [f"relay.{o}.wake" for o in others]
    if service not in COMMANDERS:
        publishes += [f"host.x.{w}" for w in ("order", "cancel", "committed", "report", "ask.x")]
    if service != "ha":
        publishes += ["host.x.power", "host.x.try"]
    for subject in publishes:
        assert await me.publish_refused(subject), f"{service} published {subject}"
    subscriptions = [">", "*", "host.>", "host.x.order", "host.*.order", "fact.>", "$SYS.>"]
    subscriptions += ["$SYS.ACCOUNT.*.CONNECT", "$JS.API.>", "$JS.ACK.>", "_INBOX.>", "_INBOX.x.>"]
    subscriptions += [f"{o}.>" for o in others] + [f"{o}.vm.start" for o in others]
    subscriptions += [f"_INBOX.{s}.>" for s in SERVICES if s != service] + ["$SRV.>"]
    subscriptions += [f"relay.{o}.wake" for o in others] + ["fact.host.>", "beat.>"]
    if service not in LISTENERS:
        subscriptions += ["beat.host.*", "metrics.host.*", "beat.host.x"]
    for subject in subscriptions:
        assert await me.subscribe_refused(subject), f"{service} subscribed {subject}"
    assert me.nc.is_connected


async def test_the_system_users_can_do_their_one_thing(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    watcher, claims = await connect("sys"), await connect("claims")
    for user in (watcher, claims):
        refused = ["$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.ACCOUNT.PING", "$SYS.DEBUG.SUBSCRIBERS"]
        refused += ["$SYS.REQ.CLAIMS.DELETE", "$SYS.REQ.CLAIMS.LIST", "$SYS.REQ.SERVER.RELOAD", "x"]
        refused += ["$SYS.REQ.CLAIMS.UPDATE"] if user is watcher else ["$SYS.REQ.SERVER.PING.JSZ"]
        for subject in refused:
            assert await user.publish_refused(subject), subject
        for subject in (">", "$SYS.>", "$SYS.SERVER.>", "_INBOX.>", "$SYS.REQ.>"):
            assert await user.subscribe_refused(subject), subject
    assert await claims.subscribe_refused("$SYS.ACCOUNT.*.DISCONNECT")
    varz = await watcher.nc.request("$SYS.REQ.SERVER.PING.VARZ", b"", timeout=PATIENCE_SECONDS)
    assert json.loads(varz.data)["data"]["version"] == "2.15.1"
    jsz = await watcher.nc.request("$SYS.REQ.SERVER.PING.JSZ", b"", timeout=PATIENCE_SECONDS)
    assert json.loads(jsz.data)["data"]["config"]["sync_always"] is True


async def test_the_watcher_learns_which_host_came_and_went(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    watcher = await connect("sys")
    came = await watcher.nc.subscribe("$SYS.ACCOUNT.*.CONNECT")
    went = await watcher.nc.subscribe("$SYS.ACCOUNT.*.DISCONNECT")
    await settle(watcher.nc)
    host_id, creds, key = enrol(realm, tmp_path)
    liar = await open_user(server, creds, host_id, called="another host")
    await liar.nc.close()
    for subscription in (came, went):
        message = await subscription.next_msg(PATIENCE_SECONDS)
        assert message.subject.split(".")[2] == realm.accounts["VOLERY"]
        presence = read_presence(message.data)
        assert (presence.name, presence.public_key) == (host_id, key.public)
    assert presence.reason == "Client Closed"
