"""docker-compose.yml, run for real: up, a VM through it, a NATS node and a replica killed, down.

The tests are one story and run in this order.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import httpx
import pytest

from tests.api_gateway.sse_client import Follower, Received
from tests.compose.containers import IMAGE, POSTGRES, ROOT, Stack, build, podman
from tests.support.ports import free_ports
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.session import Session
from volery.client.transport import AsyncClient
from volery.contracts.account import IssuedToken, Login
from volery.contracts.cluster import Cluster, CreateCluster, CreateDataCenter, DataCenter
from volery.contracts.host import CreateHost, HostStatus, HostToken
from volery.contracts.operation import Operation
from volery.contracts.vm import CreateVm, StartVm, StopVm, Vm, VmStatus

T = TypeVar("T")

pytestmark = pytest.mark.timeout(1200)
"""The first run makes its base images, which takes minutes."""

READY_SECONDS = 90.0
HOST_SECONDS = 60.0
ACTION_SECONDS = 60.0
PORTS = ("VOLERY_GATEWAY_PORT", "VOLERY_NATS_1_PORT", "VOLERY_NATS_2_PORT", "VOLERY_NATS_3_PORT")
OWNERS = ("inventory", "scheduler", "storage", "network", "ha", "dwh")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Everything up, inventory twice. Whatever a test left is gone afterwards."""
    settings = {
        "VOLERY_IMAGE": IMAGE,
        "VOLERY_POSTGRES_IMAGE": POSTGRES,
        "VOLERY_PUBLIC_ADDRESS": "127.0.0.1",
        "VOLERY_INVENTORY_REPLICAS": "2",
        # Published ports must be known before the containers exist.
        **{name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)},
    }
    with TemporaryDirectory(prefix="volery-compose-") as directory, podman(Path(directory)) as engine:
        build(engine)
        made = Stack(engine, f"vt{secrets.token_hex(3)}", settings)
        try:
            made.up()
            yield made
        finally:
            engine("rm", "--force", "--time=1", made.container("agent"), check=False)
            if made.containers() or made.volumes():
                made.down()


async def until(told: Callable[[], Awaitable[T | None]], seconds: float, what: Callable[[], str]) -> T:
    """What `told` says once it says something. There is no event to wait for: containers start, processes end."""
    deadline = time.monotonic() + seconds
    while (found := await told()) is None:
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def session(stack: Stack) -> Session:
    """The administrator, logged in with the password that set-up made, once everything is ready."""
    url = f"https://127.0.0.1:{stack.settings['VOLERY_GATEWAY_PORT']}"
    ca_file = stack.podman.directory / "ca.pem"

    async def log_in() -> Session:
        await until(authority, READY_SECONDS, lambda: stack.logs("setup"))
        await until(ready, READY_SECONDS, lambda: "\n".join(stack.logs(s) for s in ("setup", "gateway")))
        login = Login(name="admin", password=stack.exec("setup", "cat", "/keep/realm/admin.password").strip())
        async with AsyncClient(Session(url=url, ca_file=str(ca_file))) as client:
            issued = await client.send(Request("POST", "sessions", IssuedToken, body_of(login)))
        return Session(url=url, ca_file=str(ca_file), token=issued.secret)

    async def authority() -> bool | None:
        ca_file.write_text(stack.exec("setup", "cat", "/keep/realm/pki/ca.pem", check=False))
        return True if ca_file.stat().st_size else None

    async def ready() -> bool | None:
        async with httpx.AsyncClient(base_url=url, verify=ssl.create_default_context(cafile=ca_file)) as http:
            try:
                answer = await http.get("/readyz")
            except httpx.TransportError:
                return None
        return True if answer.status_code == 200 and all(answer.json()["services"].values()) else None

    return asyncio.run(log_in())


@pytest.fixture
async def client(session: Session) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(session) as connected:
        yield connected


@asynccontextmanager
async def following(session: Session, cursor: str = "") -> AsyncIterator[list[Received]]:
    """The events from `cursor` on, as they come; the client resumes by itself as a browser does."""
    heard: list[Received] = []
    began = asyncio.Event()

    async with httpx.AsyncClient(
        base_url=f"{session.url}/api/v1",
        headers={"authorization": f"Bearer {session.token}"},
        verify=ssl.create_default_context(cafile=session.ca_file),
    ) as http:
        follower = Follower(http, cursor)

        async def follow() -> None:
            async for event in follower.events():
                began.set()
                if event is not None:
                    heard.append(event)

        task = asyncio.create_task(follow())
        try:
            async with asyncio.timeout(20):
                await began.wait()
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def revisions(heard: list[Received], vm: Vm) -> list[int]:
    """Of a VM, in the order in which its events came."""
    told = (received.event["data"] for received in heard)
    return [data["revision"] for data in told if (data.get("id"), data.get("name")) == (vm.id, vm.name)]


def led(stack: Stack, number: int) -> int:
    """The last token under which this replica of inventory has led; 0: it never has."""
    tokens = re.findall(r"inventory leads under token (\d+)", stack.logs("inventory", number))
    return int(tokens[-1]) if tokens else 0


async def started(client: AsyncClient, vm: Vm) -> Vm:
    ask = StartVm(id=vm.id)
    await client.wait(await client.send(api.VMS.act(vm.id, "start", Operation, ask)), ACTION_SECONDS)
    found = await client.send(api.VMS.get(vm.id))
    assert found.status is VmStatus.UP
    return found


async def stopped(client: AsyncClient, vm: Vm) -> None:
    ask = StopVm(id=vm.id, force=True)
    await client.wait(await client.send(api.VMS.act(vm.id, "stop", Operation, ask)), ACTION_SECONDS)
    assert (await client.send(api.VMS.get(vm.id))).status is VmStatus.DOWN


async def test_the_bus_is_three_servers_that_sync_always_and_keep_everything_thrice(
    stack: Stack, session: Session
) -> None:
    async def healthy() -> bool | None:
        return (
            True if stack.exec("setup", "sh", "-c", "test -e /tmp/healthy && echo yes", check=False) else None
        )

    await until(healthy, 30, lambda: stack.logs("setup"))
    states, replicas = json.loads(
        stack.exec("gateway", "python3", "-c", (ROOT / "tests/compose/ask.py").read_text())
    )
    assert [(s["name"], s["sync_always"], s["cluster_size"]) for s in states] == [
        (f"nats-{n}", True, 3) for n in (1, 2, 3)
    ]
    assert replicas == dict.fromkeys([*(f"FACTS_{owner.upper()}" for owner in OWNERS), "FACTS_HOST"], 3)


async def test_every_container_sees_its_own_secrets_only(stack: Stack, session: Session) -> None:
    shared = {"ca.pem", "complete"}
    also = {
        "inventory": {"claims.creds", "admin.password"},
        "storage": {"storage.key"},
        "ha": {"sys.creds", "ha.key"},
    }
    for owner in OWNERS:
        wanted = shared | {f"{owner}.creds", f"{owner}.password"} | also.get(owner, set())
        assert set(stack.exec(owner, "ls", "/run/volery").split()) == wanted
        assert ("realm" in stack.exec(owner, "cat", "/proc/mounts")) is (owner == "inventory")
    gateway = shared | {"gateway.creds", "gateway.pem", "gateway.key", "sys.creds"}
    assert set(stack.exec("gateway", "ls", "/run/volery").split()) == gateway


async def test_nothing_but_setup_and_the_database_begins_as_root(stack: Stack, session: Session) -> None:
    for service in (*OWNERS, "gateway", "nats-1", "nats-2", "nats-3", "setup"):
        status = stack.exec(service, "grep", "-E", "^(Uid|CapEff|NoNewPrivs)", "/proc/1/status").split()
        assert status[status.index("Uid:") + 2] == "10001", service
        assert set(status[status.index("CapEff:") + 1]) == {"0"}, service
        assert status[status.index("NoNewPrivs:") + 1] == "1", service


async def test_a_vm_through_it_while_a_nats_node_and_the_leading_replica_are_killed(
    stack: Stack, session: Session, client: AsyncClient
) -> None:
    center: DataCenter = await client.send(api.DATA_CENTERS.create(CreateDataCenter(name="Default")))
    cluster: Cluster = await client.send(
        api.CLUSTERS.create(CreateCluster(name="Default", data_center_id=center.id))
    )
    made = await client.send(api.HOSTS.create(CreateHost(name="h1", cluster_id=cluster.id), HostToken))
    state = stack.podman.directory / "agent"
    state.mkdir()
    stack.start_agent(
        state,
        VOLERY_AGENT_ENROLMENT_TOKEN=made.enrolment_token,
        VOLERY_AGENT_LIBVIRT_URI="test:///default",
        VOLERY_AGENT_HYPERVISOR="qemu",
    )

    async def host_up() -> bool | None:
        return True if (await client.find(api.HOSTS, "h1")).status is HostStatus.UP else None

    await until(host_up, HOST_SECONDS, lambda: stack.logs("agent"))
    async with following(session) as heard:
        ask = CreateVm(name="first", cluster_id=cluster.id, memory_bytes=64 * 2**20)
        await client.wait(await client.send(api.VMS.create(ask, Operation)), ACTION_SECONDS)
        vm = await started(client, await client.find(api.VMS, "first"))

        leading = max((1, 2), key=lambda number: led(stack, number))
        token = led(stack, leading)
        stack.kill("nats-1")
        stack.kill("inventory", leading)
        killed_at = time.monotonic()
        await stopped(client, vm)
        print(f"a VM stopped {time.monotonic() - killed_at:.1f} s after the kills")
        vm = await started(client, vm)
        assert led(stack, 3 - leading) > token

        async def told() -> bool | None:
            return True if vm.revision in revisions(heard, vm) else None

        await until(told, 20, lambda: f"no event of revision {vm.revision}: {heard}")
        seen = revisions(heard, vm)
        assert seen == sorted(set(seen)), "every change once and in order"
        cursor = heard[0].cursor
    # Whoever comes back with an old cursor hears the same again, from the two nodes that are left.
    async with following(session, cursor) as again:

        async def all_again() -> bool | None:
            return True if len(revisions(again, vm)) >= len(seen) - 1 else None

        await until(all_again, 20, lambda: f"{revisions(again, vm)} is not {seen}")
    assert revisions(again, vm)[-1] == vm.revision


async def test_what_was_killed_comes_back(stack: Stack, session: Session, client: AsyncClient) -> None:
    for each in stack.containers():
        if each["State"] != "running":
            stack.podman("start", each["Names"][0])

    async def whole() -> bool | None:
        told = stack.exec("gateway", "python3", "-c", (ROOT / "tests/compose/ask.py").read_text())
        return True if len(json.loads(told)[0]) == 3 else None

    await until(whole, 30, lambda: stack.logs("nats-1"))
    vm = await client.find(api.VMS, "first")
    await stopped(client, vm)


async def test_down_leaves_nothing(stack: Stack, session: Session) -> None:
    stack.podman("rm", "--force", "--time=5", stack.container("agent"))
    stack.down()
    assert stack.containers() == []
    assert stack.volumes() == []
    assert stack.podman("network", "ls", "--quiet", f"--filter=name={stack.name}").stdout == ""
