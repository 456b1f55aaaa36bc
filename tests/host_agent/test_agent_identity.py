"""The agent as the bus really knows it: its own key, its own subjects, orders signed by the owner's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from nats.js.api import StreamConfig

from host_agent.agent import Agent
from host_agent.config import AgentConfig
from host_agent.enrolment import Identity, Keys, store
from tests.support import nats_realm, toy_agent
from tests.support.agent_process import Listener
from tests.support.toy_host import HOST_ID, TOY, Control, Toy
from volery.contracts.agent import CancelOrder, CommittedWord, OrderAck, OrderState, Outcome
from volery.contracts.base import encode
from volery.contracts.enrolment import Enrolled
from volery.runtime.connection import connect_options
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import Key, Signer, parse_creds


@asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[asyncio.Task[int]]:
    stop = asyncio.Event()
    task = asyncio.create_task(agent.run(stop))
    try:
        yield task
    finally:
        stop.set()
        await task


def enrolled(realm: Realm, state_dir: Path, url: str) -> Identity:
    key = Key.new("user")
    answer = Enrolled(
        host_id=HOST_ID,
        installation="test",
        user_jwt=mint_agent(realm, HOST_ID, key.public),
        bus_servers=(url,),
        owner_keys=realm.order_keys(),
        ca_pem="",
        certificate_pem="",
    )
    return store(state_dir, Identity(keys=Keys(seed=key.seed, data_key_pem=""), enrolled=answer))


async def test_its_permissions_are_enough_and_no_more(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "realm")
    server = nats_realm.Server(tmp_path / "nats", realm)
    server.write_config()
    server.start()
    try:
        user = await nats_realm.open_user(server, realm.creds_path("inventory"), "inventory")
        await user.nc.jetstream().add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
        _, key = parse_creds(realm.creds_path("inventory").read_text())
        control = Control(signer=Signer(key.seed))
        ear = Listener(user.nc, control)
        await ear.listen()
        identity = enrolled(realm, tmp_path / "state", server.url)
        settings = AgentConfig(
            state_dir=str(tmp_path / "state"), libvirt_uri="test:///default", beat_seconds=0.05
        )
        agent = Agent(settings, identity, toy_agent.PARTS)
        async with running(agent) as task:
            report = (await ear.until(lambda: ear.of("inventory.reported")))[0]
            order = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), seconds=0.2))
            assert (await ear.send(order)).state is OrderState.ACCEPTED
            assert (await ear.finished(order)).outcome is Outcome.SUCCEEDED
            cancel = CancelOrder(host_id=HOST_ID, order_id="never-sent")
            subject, payload, headers = control.signed(cancel, "cancel")
            answer = await user.nc.request(subject, payload, timeout=5, headers=headers)
            assert msgspec.json.decode(answer.data, type=OrderAck).state is OrderState.UNKNOWN
            word = CommittedWord(host_id=HOST_ID, owner="inventory", generation=report.generation, seq=1)
            await user.nc.publish(f"host.{HOST_ID}.committed", encode(word))
            assert not task.done()
        assert user.errors == []
        log = (tmp_path / "nats" / "log").read_text()
        assert "Permissions Violation" not in log
        await user.nc.close()
    finally:
        server.stop()


async def test_another_services_key_does_not_stand_for_the_owners(tmp_path: Path) -> None:
    """The bus lets storage publish orders too; the agent tells them apart by their signatures."""
    realm = Realm.create(tmp_path / "realm")
    server = nats_realm.Server(tmp_path / "nats", realm)
    server.write_config()
    server.start()
    try:
        user = await nats_realm.open_user(server, realm.creds_path("storage"), "storage")
        inventory = await nats_realm.open_user(server, realm.creds_path("inventory"), "inventory")
        await inventory.nc.jetstream().add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
        _, key = parse_creds(realm.creds_path("storage").read_text())
        control = Control(signer=Signer(key.seed))
        ear = Listener(inventory.nc, control)
        await ear.listen()
        identity = enrolled(realm, tmp_path / "state", server.url)
        settings = AgentConfig(
            state_dir=str(tmp_path / "state"), libvirt_uri="test:///default", beat_seconds=0.05
        )
        async with running(Agent(settings, identity, toy_agent.PARTS)):
            await ear.until(lambda: ear.of("inventory.reported"))
            order = await ear.order(TOY, Toy(path=str(tmp_path / "marks")))
            ear.client = user.nc
            assert (await ear.send(order)).state is OrderState.REFUSED
            rightful = msgspec.structs.replace(order, owner="storage")
            assert (await ear.send(rightful)).state is OrderState.ACCEPTED
        await user.nc.close()
        await inventory.nc.close()
    finally:
        server.stop()


def test_beats_never_wait_in_a_buffer(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "realm")
    identity = enrolled(realm, tmp_path / "state", "nats://127.0.0.1:4222")
    assert identity.creds_path is not None
    options = connect_options(identity.creds_path, HOST_ID, ["nats://127.0.0.1:4222"], at_once=True)
    assert options["pending_size"] == 0
    assert options["max_reconnect_attempts"] == -1
