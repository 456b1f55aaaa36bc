"""Storage leases of silent hosts: what their readings prove, and that ha acts on nothing less."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from services.ha.policies.leases import Watched, next_look, observe
from tests.ha.world import Inventory, becomes, ha, hearts, host, hurried, until, vm
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused, unavailable
from volery.contracts.host import HOST_CHANGED
from volery.contracts.leases import (
    IMAGE_HELD,
    LEASE_HELD,
    ExpiredLease,
    HostLeaseReading,
    HostLeaseReadings,
    LockspaceReport,
    Watchdog,
    dead_seconds,
)
from volery.contracts.liveness import GET_LIVENESS, LIST_RESTARTS, ProofKind
from volery.contracts.operation import ListQuery
from volery.contracts.storage import READ_HOST_LEASES, HostLeases, HostLeaseSeen, ReadHostLeases
from volery.contracts.together import HELD
from volery.contracts.vm import VM_CHANGED, VmStatus
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings

LONG = dead_seconds(10) + 4.0


def reading(at: float, **fields: Any) -> HostLeaseReading:
    given = {"holder": "h1", "generation": 7, "timestamp": 1000, "io_timeout_seconds": 10} | fields
    return HostLeaseReading(asked_seconds=at, answered_seconds=at + 0.1, **given)


def seen(at: float, *, reader: str = "h2", reader_boot: str = "r1", **fields: Any) -> HostLeaseSeen:
    """As it was read twice at this moment of the reader's clock."""
    said = {
        "storage_domain_id": "d1",
        "storage_domain_name": "shared",
        "boot_id": "boot-1",
        "joined": LockspaceReport(domain_id="d1", host_number=1, generation=7, reset_host=True),
        "watchdog": Watchdog(armed=True, inescapable=True),
        "reader_id": reader,
    }
    own = {name: fields.pop(name) for name in list(fields) if name in {*said, "readings", "problem"}}
    found = reading(at, **fields)
    readings = HostLeaseReadings(reader_boot_id=reader_boot, first=found, second=found)
    return HostLeaseSeen(**(said | {"readings": readings} | own))


BEGUN = Watched("h2", "r1", "boot-1", reading(50.0), 500.0)
RESET, NOTHING = ExpiredLease.HOST_RESET, ExpiredLease.NOTHING
ROWS: list[tuple[str, HostLeaseSeen, float, ExpiredLease, bool]] = [
    # what, the reading, last sign of life, what it proves, whether counting goes on
    ("long enough", seen(50.1 + LONG), 499.0, RESET, True),
    ("a moment too early", seen(50.1 + LONG - 2.0), 499.0, NOTHING, True),
    ("renewed", seen(50.1 + LONG, timestamp=1020), 499.0, NOTHING, False),
    ("taken by another boot", seen(50.1 + LONG, generation=8), 499.0, NOTHING, False),
    ("read by another host", seen(50.1 + LONG, reader="h3"), 499.0, NOTHING, False),
    ("read by the same host after a reboot", seen(50.1 + LONG, reader_boot="r2"), 499.0, NOTHING, False),
    ("a sign of life since it was read first", seen(50.1 + LONG), 501.0, NOTHING, False),
    ("of another boot", seen(50.1 + LONG, boot_id="boot-2"), 499.0, NOTHING, False),
    ("it could not be read", seen(50.1 + LONG, readings=None), 499.0, NOTHING, True),
    ("without a watchdog", seen(50.1 + LONG, watchdog=Watchdog()), 499.0, NOTHING, True),
    ("given back", seen(50.1 + LONG, timestamp=0), 499.0, NOTHING, False),
    (
        "a lease that doesn't reset the host",
        seen(50.1 + LONG, joined=LockspaceReport(domain_id="d1", host_number=1, generation=7)),
        499.0,
        ExpiredLease.NO_HOLDERS,
        True,
    ),
]


@pytest.mark.parametrize(
    ("said", "last_sign", "proves", "goes_on"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_what_one_more_reading_comes_to(
    said: HostLeaseSeen, last_sign: float, proves: ExpiredLease, goes_on: bool
) -> None:
    found = observe(BEGUN, said, 700.0, last_sign)
    assert found.proves is proves
    assert (found.watched == BEGUN) is goes_on
    if not goes_on:
        assert found.watched is not None
        assert found.watched.asked_at == 700.0


def test_the_first_reading_proves_nothing_however_old_the_lease_is() -> None:
    assert observe(None, seen(1e6), 1.0, 0.0).proves is NOTHING


def test_it_is_read_again_as_soon_as_it_would_prove_something() -> None:
    ripe = 500.0 + dead_seconds(10) + 3
    assert next_look([BEGUN], 510.0, 5.0, 0.5) == 515.0
    assert next_look([BEGUN], ripe - 2.0, 5.0, 0.5) == ripe + 0.5
    assert next_look([BEGUN], ripe + 9.0, 5.0, 0.5) == ripe + 14.0


@dataclass
class Storage(Speaker):
    """Reads leases on a clock of its own, which a test moves."""

    owner: Owner = Owner.STORAGE
    now: float = 100.0
    says_: Callable[[float], HostLeaseSeen] = lambda at: seen(at)
    asked: list[ReadHostLeases] = field(default_factory=list)
    refusal: Refused | None = None

    def __post_init__(self) -> None:
        self.answers = [(READ_HOST_LEASES, self._read)]

    async def _read(self, _: Speaker, ask: ReadHostLeases, caller: Caller) -> HostLeases:
        self.asked.append(ask)
        if self.refusal is not None:
            raise self.refusal
        return HostLeases(leases=(self.says_(self.now),))

    async def read_again(self, times: int = 2) -> None:
        count = len(self.asked)

        async def enough() -> bool:
            return len(self.asked) >= count + times

        await until(enough)


async def test_a_host_is_dead_once_its_lease_has_expired(configured: Settings) -> None:
    storage, owner = Storage(), Inventory()
    h1, h2 = host("h1", boot_id="boot-1"), host("h2")
    async with running(hurried(configured), owner.service(), storage.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1, h2)
        async with hearts(bus.client, h1, h2) as (silent, _):
            await becomes(bus, h1.id, "up")
            assert storage.asked == []
            silent.stop()
            await becomes(bus, h1.id, "non_responsive")
            await storage.read_again()
            assert storage.asked[-1] == ReadHostLeases(host_id=h1.id, reader_ids={"d1": "h2"})
            storage.now += LONG - 10
            await storage.read_again()
            assert (await bus.ask(GET_LIVENESS, GetById(id=h1.id))).state == "non_responsive"
            storage.now += 10
            dead = await becomes(bus, h1.id, "dead")
            assert dead.proof is not None
            assert (dead.proof.kind, dead.proof.boot_id) == (ProofKind.LEASE_EXPIRED, "boot-1")
            assert {ask.host_id for ask in storage.asked} == {h1.id}
            count = len(storage.asked)
            silent.boot_id = "boot-2"
            silent.start()
            await becomes(bus, h1.id, "up")
            assert len(storage.asked) <= count + 1


async def test_nothing_less_than_an_expired_lease_makes_it_dead(configured: Settings) -> None:
    storage, owner = Storage(), Inventory()
    h1 = host("h1", boot_id="boot-1")
    async with running(hurried(configured), owner.service(), storage.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (silent,):
            await becomes(bus, h1.id, "up")
            silent.stop()
            await becomes(bus, h1.id, "non_responsive")
            await storage.read_again()
            for says in (
                lambda at: seen(at, readings=None, problem="the storage could not be read"),
                lambda at: seen(at, watchdog=Watchdog(armed=True)),
                lambda at: seen(at, timestamp=int(at)),
            ):
                storage.says_ = says
                storage.now += LONG
                await storage.read_again(1)
            storage.refusal = unavailable("storage has no host to ask")
            storage.now += LONG
            await storage.read_again(1)
            await asyncio.sleep(0.6)  # two judgements
            assert (await bus.ask(GET_LIVENESS, GetById(id=h1.id))).state == "non_responsive"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LEASE_HELD, b"waits for its lease"),
        (IMAGE_HELD, b"waits for a lock on its disk to go"),
        (HELD, b"waits for what is done with its disk to end"),
    ],
)
async def test_a_restart_that_waits_for_what_a_dead_host_held_is_no_attempt(
    configured: Settings, rule: str, words: bytes
) -> None:
    owner, h1 = Inventory(), host("h1")
    owner.ends_with = Refused(Kind.CONFLICT, "h2: it is held", rule=rule)
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            up = vm(host_id=h1.id, epoch=3)
            down = replace(up, revision=2, status=VmStatus.DOWN, status_reason="host_died", host_id="")
            await owner.says(VM_CHANGED, up, down)

            async def asked(count: int) -> bool:
                return len(owner.asked) >= count

            await until(lambda: asked(1))
            await owner.says(VM_CHANGED, replace(down, revision=9, epoch=4))

            async def waits() -> Any:
                found = (await bus.ask(LIST_RESTARTS, ListQuery(filter={"vm_name": "web"}))).items
                return [item for item in found if words in bytes(item)]

            await until(waits)
            assert b'"attempts":0' in bytes((await waits())[0])
            owner.ends_with = None
            await until(lambda: asked(2))
