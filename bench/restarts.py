"""How long ha needs to order what a dead host ran: real services, scripted hosts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime

import msgspec

from bench.fleet import CALLERS, FleetHost, fleet
from bench.load import connect, request
from bench.processor import processor_seconds
from bench.rows import Line, below
from bench.world import Installation, World, installed
from lab.plane import make_cluster
from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.liveness import HostLiveness, LivenessState
from volery.contracts.operation import Operation
from volery.contracts.power import ConfirmHostRebooted

HOSTS, VMS = 10, 100
MEMORY_BYTES = 256 << 20
COST_MS = 20.0
"""Of a processor: on two of them a hundred restarts take a second then, all included."""
PATIENCE_SECONDS = 120.0


async def ordered(world: World) -> list[Line]:
    """From the proof until the last of a host's 100 highly available VMs was ordered to start elsewhere, and until the
    last of these orders was with the host that is to run it."""
    with ExitStack() as stack:
        there = await asyncio.to_thread(stack.enter_context, installed())
        cluster = await asyncio.to_thread(make_cluster, there.client)
        async with fleet(there, cluster.id, HOSTS) as hosts:
            await run_on(there, cluster.id, hosts[0])
            await hosts[0].leave()
            await asyncio.to_thread(until_silent, there, hosts[0])
            before = processor_seconds(there)
            died_at = await asyncio.to_thread(confirm, there, hosts[0])
            given = await all_given(hosts[1:])
            asked = await asyncio.to_thread(all_ended, there)
            after = processor_seconds(there)
        await asyncio.to_thread(stack.close)
    last, arrived = (max((at - died_at).total_seconds() for at in times) for times in (asked, given))
    first = min((at - died_at).total_seconds() for at in asked)
    note = f"{VMS} VMs of one of {HOSTS} scripted hosts, whose death a person confirmed; the first after {first:.2f} s"
    turns = "hosts take 8 at a time, and these start a guest at once"
    each = {part: (after[part] - before[part]) / VMS * 1000 for part in after}
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in each.items())
    whole = (
        f"{parts}; from the confirmation until all {VMS} operations have ended, with what this asks meanwhile"
    )
    return [
        below(f"proof of death until {VMS} restarts are ordered", last, 1.0, "s", note),
        below(f"proof of death until {VMS} orders are with their hosts", arrived, 1.0, "s", turns),
        below("processor time of one restart", sum(each.values()), COST_MS, "ms", whole),
    ]


async def run_on(there: Installation, cluster_id: str, host: FleetHost) -> None:
    """All VMs on one host, through REST."""
    numbers = iter(range(VMS))

    async def caller() -> None:
        http = await connect(there.url, there.tls)

        async def ended(path: str, body: dict[str, object]) -> Operation:
            ask = request("POST", path, there.token, msgspec.json.encode(body), Prefer="wait=30")
            return msgspec.json.decode(await http.ask(ask, 0), type=Operation)

        for number in numbers:
            body = {
                "name": f"vm{number:03d}",
                "cluster_id": cluster_id,
                "memory_bytes": MEMORY_BYTES,
                "high_availability": {"enabled": True},
            }
            made = await ended("/api/v1/vms", body)
            await ended(f"/api/v1/vms/{made.object_id}/start", {"host_id": host.host_id})
        http.close()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    assert len(host.domains) == VMS, len(host.domains)


def until_silent(there: Installation, host: FleetHost) -> None:
    until(lambda: there.client.send(api.LIVENESS.get(host.host_id)).state is LivenessState.NON_RESPONSIVE)


def confirm(there: Installation, host: FleetHost) -> datetime:
    """When the proof was, by ha's own word."""
    yes = ConfirmHostRebooted(id=host.host_id, confirm=host.name, reason="bench")
    path = f"hosts/{host.host_id}/confirm-rebooted"
    said = there.client.send(Request("POST", path, HostLiveness, body_of(yes)))
    assert said.proof is not None
    return said.proof.at


def all_ended(there: Installation) -> list[datetime]:
    """When the restarts were ordered, by inventory's own word, once all of them have succeeded."""

    def succeeded() -> list[Operation]:
        return list(
            there.client.list(api.OPERATIONS, filter={"kind": "vm.restart", "state": "succeeded"}, limit=1000)
        )

    until(lambda: len(succeeded()) >= VMS)
    return [op.created_at for op in succeeded()]


async def all_given(hosts: list[FleetHost]) -> list[datetime]:
    """When each VM's order came to its new host, by the same clock."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while sum(len(host.ordered) for host in hosts) < VMS:
            await asyncio.sleep(0.2)
    return [at for host in hosts for at in host.ordered.values()]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)  # what is measured are the services' own times, not when this looks
