"""A revoked user is cut on every server, whatever servers and files forget; others don't notice."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from tests.support.nats_realm import PATIENCE_SECONDS, Connect, Server, enrol, is_turned_away, open_user
from volery.contracts.errors import Refused
from volery.runtime.connection import push_accounts, revoke, settle
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import Key, read_jwt, sign_jwt


async def test_a_revoked_agent_is_cut_at_once_and_nobody_else_notices(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    (a, a_creds, a_key), (b, b_creds, _) = enrol(realm, tmp_path), enrol(realm, tmp_path)
    bad, good = await connect(a, a_creds), await connect(b, b_creds)
    inventory, claims = await connect("inventory"), await connect("claims")

    async def answer(message: Msg) -> None:
        await message.respond(b"here")

    await good.nc.subscribe(f"host.{b}.order", cb=answer)
    await settle(good.nc)
    began = time.monotonic()
    await revoke(realm, claims.nc, [a_key.public])
    await asyncio.wait_for(bad.closed.wait(), PATIENCE_SECONDS)
    assert time.monotonic() - began < 1.0
    assert (await inventory.nc.request(f"host.{b}.order", b"", timeout=5)).data == b"here"
    assert await is_turned_away(server, a_creds, a)
    for user in (good, inventory, claims):
        assert (user.disconnects, user.errors) == (0, [])
    assert a_key.public in realm.revoked("VOLERY")
    with pytest.raises(Refused, match="revoked"):
        mint_agent(realm, a, a_key.public)
    new_host, new_creds, _ = enrol(realm, tmp_path, a)
    assert not await is_turned_away(server, new_creds, new_host)


async def test_a_service_or_nonsense_can_not_be_revoked(realm: Realm, connect: Connect) -> None:
    claims = await connect("claims")
    with pytest.raises(Refused, match="belongs to a service"):
        await revoke(realm, claims.nc, [realm.users["inventory"]])
    with pytest.raises(Refused, match="not a user's public key"):
        await revoke(realm, claims.nc, ["*"])


async def test_repeating_a_revocation_signs_nothing_anew(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    _, _, key = enrol(realm, tmp_path)
    claims = await connect("claims")
    await revoke(realm, claims.nc, [key.public])
    signed = realm.account_jwt("VOLERY")
    await revoke(realm, claims.nc, [key.public])
    await push_accounts(realm, claims.nc)
    assert realm.account_jwt("VOLERY") == signed


async def test_quick_revocations_and_another_replicas_all_hold(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    """Claims count whole seconds, and a second replica has its own copy of the files."""
    own.start()
    shutil.copytree(own.realm.directory, tmp_path / "replica")
    replica = Realm.load(tmp_path / "replica")
    claims = await connect("claims", at=own)
    agents = [enrol(own.realm, tmp_path) for _ in range(6)]
    for number, (_, _, key) in enumerate(agents):
        await revoke(replica if number % 2 else own.realm, claims.nc, [key.public])
    for host_id, creds, _ in agents:
        assert await is_turned_away(own, creds, host_id)
    assert own.realm.revoked("VOLERY") | replica.revoked("VOLERY") == {k.public for _, _, k in agents}
    claims_served = read_jwt(replica.account_jwt("VOLERY"), own.realm.operator)
    assert len(claims_served["nats"]["revocations"]) == 6


async def test_a_revocation_outlives_the_server_and_its_store(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    own.start()
    (a, a_creds, a_key), (b, b_creds, _) = (enrol(own.realm, tmp_path) for _ in range(2))
    good = await connect(b, b_creds, at=own)
    claims = await connect("claims", at=own)
    await revoke(own.realm, claims.nc, [a_key.public])

    own.stop()
    own.start()  # with the preload from before the revocation, on the store from after it
    assert await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(good.reconnected.wait(), PATIENCE_SECONDS)
    good.reconnected.clear()

    own.stop()
    shutil.rmtree(own.directory / "resolver")
    own.write_config()
    own.start()  # with an empty store, on a preload rendered anew
    assert await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(good.reconnected.wait(), PATIENCE_SECONDS)
    assert not await good.publish_refused(f"beat.host.{b}")


async def test_a_server_that_went_back_in_time_is_healed(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    own.start()
    a, a_creds, a_key = enrol(own.realm, tmp_path)
    claims = await connect("claims", at=own)
    await revoke(own.realm, claims.nc, [a_key.public])
    own.stop()
    shutil.rmtree(own.directory / "resolver")
    own.start()  # with an empty store and the old preload: it doesn't know of the revocation
    assert not await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(claims.reconnected.wait(), PATIENCE_SECONDS)
    await push_accounts(own.realm, claims.nc)
    assert await is_turned_away(own, a_creds, a)


async def test_a_revocation_that_no_server_confirms_is_kept_and_told(own: Server, tmp_path: Path) -> None:
    own.start()
    host_id, creds, key = enrol(own.realm, tmp_path)
    claims = await open_user(own, own.realm.creds_path("claims"), "claims")
    own.stop()
    with pytest.raises(Refused, match=r"no NATS server took.*repeat"):
        await revoke(own.realm, claims.nc, [key.public], timeout_seconds=0.3)
    own.start()
    await asyncio.wait_for(claims.reconnected.wait(), PATIENCE_SECONDS)
    await revoke(own.realm, claims.nc, [key.public])
    await claims.nc.close()
    assert await is_turned_away(own, creds, host_id)


async def test_new_permissions_reach_connected_users_and_only_those_concerned(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    """What an upgrade does: the table changed, the accounts are signed anew, credentials stay."""
    operator = Key((own.realm.directory / "keys" / "operator.seed").read_text())
    path = own.realm.directory / "accounts" / "VOLERY.jwt"
    old = read_jwt(path.read_text(), own.realm.operator)
    (agents,) = [scope for scope in old["nats"]["signing_keys"] if scope["role"] == "agent"]
    agents["template"]["pub"] = {"deny": [">"]}
    volery = own.realm.accounts["VOLERY"]
    path.write_text(sign_jwt(operator, volery, "VOLERY", old["nats"], old["iat"] - 100))
    own.write_config()
    own.start()
    host_id, creds, _ = enrol(own.realm, tmp_path)
    agent, inventory = await connect(host_id, creds, own), await connect("inventory", at=own)
    assert await agent.publish_refused(f"beat.host.{host_id}")
    upgraded = Realm.create(own.realm.directory)
    await push_accounts(upgraded, (await connect("claims", at=own)).nc)
    await asyncio.wait_for(agent.reconnected.wait(), PATIENCE_SECONDS)
    assert not await agent.publish_refused(f"beat.host.{host_id}")
    assert not await inventory.publish_refused("inventory.vm.get")
    assert inventory.disconnects == 0


async def test_a_cluster_cuts_an_agent_on_every_node_also_on_one_that_was_away(
    tmp_path: Path,
) -> None:
    realm = Realm.create(tmp_path / "bus")
    nodes: list[Server] = []
    async with AsyncExitStack() as stack:
        for number in range(3):
            node = Server(tmp_path / f"node{number}", realm)
            stack.callback(node.stop)
            routes = f'routes: ["{nodes[0].cluster_url}"]' if nodes else ""
            node.write_config(
                f'cluster: {{ name: "volery", listen: "127.0.0.1:-1", {routes} }}', jetstream=False
            )
            node.start()
            nodes.append(node)
        claims = await open_user(nodes[0], realm.creds_path("claims"), "claims")
        stack.push_async_callback(claims.nc.close)
        (a, a_creds, a_key), (b, b_creds, _) = (enrol(realm, tmp_path) for _ in range(2))
        bad, good = await open_user(nodes[1], a_creds, a), await open_user(nodes[1], b_creds, b)
        stack.push_async_callback(good.nc.close)
        nodes[2].stop()

        began = time.monotonic()
        await revoke(realm, claims.nc, [a_key.public])
        await asyncio.wait_for(bad.closed.wait(), PATIENCE_SECONDS)
        assert time.monotonic() - began < 1.0
        assert good.disconnects == 0
        for node in nodes[:2]:
            assert await is_turned_away(node, a_creds, a)

        nodes[2].start()  # on the store and the preload from before: it learns from its neighbours
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await is_turned_away(nodes[2], a_creds, a):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)  # nothing is announced to clients when servers have compared
