"""Leases on lab hosts, by the agent's own orders: real sanlock and wdmd, libvirt's plugin, QEMU, and the watchdog.

The waits are sanlock's own arithmetic, so one trial has everything in it that takes them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from lab import processes
from lab.host import Boot, Host
from lab.lab import Lab
from volery.contracts.base import Message, Order, encode
from volery.contracts.domain import DomainLease, DomainSpec
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    RUN_DOMAIN,
    STOP_DOMAIN,
    AdmitMigration,
    RunDomain,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.leases import (
    CREATE_LEASE,
    JOIN_LOCKSPACE,
    LEAVE_LOCKSPACE,
    READ_HOST_LEASE,
    REPORT_LEASES,
    CreateLease,
    ExpiredLease,
    HostLeaseReading,
    JoinLockspace,
    LeasesReport,
    LeaveLockspace,
    ReadHostLease,
    ReportLeases,
    proven,
    unchanged_seconds,
)
from volery.contracts.volume_orders import CONNECT_STORAGE, ConnectStorage, DirectoryLocation

ROOT = Path(__file__).resolve().parents[2]
IO_TIMEOUT_SECONDS = 2
T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A")


class Refusal(Message):
    refused: Kind | None = None
    message: str = ""


@dataclass
class Domain:
    """A storage domain in the lab's shared directory."""

    lab: Lab
    domain_id: str = field(default_factory=new_id)

    def path(self, name: str) -> str:
        return str(self.lab.shared_on_hosts / self.domain_id / "leases" / name)

    def outside(self, name: str) -> Path:
        """The same file, on the machine."""
        return self.lab.shared / self.domain_id / "leases" / name

    def join(self, host: Host, *, reset_host: bool = False) -> None:
        """With whatever is missing on the storage: several hosts at once, and whoever is first makes it."""
        location = DirectoryLocation(path=str(self.lab.shared_on_hosts))
        connect = ConnectStorage(domain_id=self.domain_id, location=location, initialise=True)
        join = JoinLockspace(
            domain_id=self.domain_id,
            path=self.path("lockspace"),
            host_number=host.number,
            io_timeout_seconds=IO_TIMEOUT_SECONDS,
            initialise=True,
            reset_host=reset_host,
        )
        joined = give(host, JOIN_LOCKSPACE, join, first=[(CONNECT_STORAGE, connect)], state=self.domain_id)
        assert (joined.host_number, joined.reset_host) == (host.number, reset_host)

    def vm(self) -> DomainSpec:
        vm_id = new_id()
        return DomainSpec(
            vm_id=vm_id,
            name=f"v{vm_id[-8:]}",
            title="leased",
            memory_bytes=32 << 20,
            graphics=False,
            installation="test01",
            lease=DomainLease(lockspace=self.domain_id, key=vm_id, path=self.path(vm_id)),
        )

    def start_new(self, host: Host) -> DomainSpec:
        """A VM that runs there, with a new lease."""
        spec = self.vm()
        lease = CreateLease(domain_id=self.domain_id, key=spec.vm_id, path=self.path(spec.vm_id))
        give(
            host,
            RUN_DOMAIN,
            RunDomain(vm_id=spec.vm_id, spec=spec),
            first=[(CREATE_LEASE, lease)],
            state=self.domain_id,
        )
        return spec

    def volume(self) -> DomainLease:
        """Of a volume of one block, which is there, and the lease, which whoever writes first makes."""
        key = new_id()
        self.content(key).write_bytes(bytes(4096))
        return DomainLease(lockspace=self.domain_id, key=key, path=self.path(key))

    def content(self, key: str) -> Path:
        return self.lab.shared / self.domain_id / "disks" / f"{key}.raw"

    def writer(self, host: Host, lease: DomainLease, *how: str) -> list[str]:
        """See `tests.support.writing_program`."""
        path = self.lab.shared_on_hosts / self.domain_id / "disks" / f"{lease.key}.raw"
        program = [sys.executable, "-m", "tests.support.writing_program", str(host.home / self.domain_id)]
        return [*program, encode(lease).decode(), str(path), *how]

    def takes(self, host: Host, lease: DomainLease, word: str) -> bytes:
        """What was in the volume when the host began to write it; nothing while its lease is another host's. sanlock waits for
        one that stands still until it is over."""
        how = self.writer(host, lease, "once", word)
        said = host.exec(how, timeout_seconds=180, environment={"PYTHONPATH": str(ROOT)}).stdout.strip()
        if said.startswith("refused: "):
            assert "another host holds it" in said, said
            return b""
        return bytes.fromhex(said)

    def begin_writing(self, host: Host) -> DomainLease:
        """A volume that a tool of this host's agent writes until the host ends. A child of the host's own process 1: the
        machine's nsenter would stand still with it, and keep the dead host from being gone."""
        lease = self.volume()
        on = [
            "setsid",
            "--fork",
            "sh",
            "-c",
            'exec "$@" > /dev/null 2>&1',
            "sh",
            *self.writer(host, lease, "on"),
        ]
        host.exec(on, environment={"PYTHONPATH": str(ROOT)})
        until(lambda: any(self.content(lease.key).read_bytes()) or None, "the tool writes")
        return lease

    def read(self, reader: Host, number: int) -> HostLeaseReading:
        order = ReadHostLease(
            domain_id=self.domain_id, path=self.path("lockspace"), host_number=number, wait_seconds=0.0
        )
        return give(reader, READ_HOST_LEASE, order, state=self.domain_id).second


def give(
    host: Host,
    order: Order[Q, A],
    body: Q,
    *,
    first: Sequence[tuple[Order[Any, Any], Any]] = (),
    state: str = "agent",
) -> A:
    """Has the agent's code on the host carry it out, and others before it. Raises Refused as it does.

    `state` names its state directory: at a time it is one process's.
    """
    orders = [text for kind, ask in (*first, (order, body)) for text in (kind.kind, encode(ask).decode())]
    done = host.exec(
        [
            *(sys.executable, "-m", "tests.support.lease_program", str(host.home / state)),
            *(str(host.layout.watchdog_class), *orders),
        ],
        timeout_seconds=180,
        environment={"PYTHONPATH": str(ROOT)},
    )
    line = done.stdout.strip().rsplit("\n", 1)[-1].encode()
    refusal = msgspec.json.decode(line, type=Refusal)
    if refusal.refused is not None:
        raise Refused(refusal.refused, refusal.message)
    return msgspec.json.decode(line, type=order.answer)


def start(host: Host, spec: DomainSpec) -> None:
    give(host, RUN_DOMAIN, RunDomain(vm_id=spec.vm_id, spec=spec))


def starts(host: Host, spec: DomainSpec) -> bool:
    """False while its lease is another host's."""
    try:
        start(host, spec)
    except Refused as refused:
        if "is held by another host" in refused.message:
            return False
        raise
    return True


def stop(host: Host, spec: DomainSpec) -> None:
    give(host, STOP_DOMAIN, StopDomain(vm_id=spec.vm_id, methods=(StopMethod.DESTROY,)))


def report(host: Host) -> LeasesReport:
    return give(host, REPORT_LEASES, ReportLeases())


def holds(host: Host, spec: DomainSpec) -> bool:
    return f":{spec.vm_id}:" in host.exec(["sanlock", "client", "status"]).stdout


def runs(host: Host, spec: DomainSpec) -> bool:
    return spec.name in host.exec(["virsh", "list", "--name"]).stdout.split()


def until(condition: Callable[[], T | None], what: str, timeout_seconds: float = 60.0) -> T:
    """For what nobody announces."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"within {timeout_seconds} s: {what}"
        time.sleep(0.2)
    return found


def boot_of(host: Host) -> Boot:
    assert host.boot is not None
    return host.boot


def ended(boot: Boot) -> bool:
    return not processes.is_alive(boot.init)


@dataclass
class World:
    """Four hosts: 1 and 2 in one lockspace, 3 too but without a watchdog; 2 and 4 in another, 4 at its own risk."""

    lab: Lab
    shared: Domain
    other: Domain

    def host(self, number: int) -> Host:
        return self.lab.host(number)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.up(4)
        lab.host(3).power_off()
        lab.host(3).power_on(hold=["wdmd"])
        made = World(lab, Domain(lab), Domain(lab))
        one, two, three, four = (lab.host(number) for number in range(1, 5))
        with ThreadPoolExecutor() as pool:
            joining = [pool.submit(made.shared.join, host) for host in (one, two, three)]
            joining.append(pool.submit(made.other.join, two))
            joining.append(pool.submit(made.other.join, four, reset_host=True))
            for joined in joining:
                joined.result()
        yield made
    finally:
        lab.down()


def test_a_host_says_whether_it_can_outlive_its_watchdog(world: World) -> None:
    able = report(world.host(1)).ability
    assert (able.version != "", able.domains, able.problem) == (True, True, "")
    assert (able.watchdog.armed, able.watchdog.inescapable, able.watchdog.problem) == (True, True, "")
    assert able.watchdog.identity == "Volery lab watchdog"
    unable = report(world.host(3)).ability
    assert not unable.watchdog.armed
    assert "wdmd doesn't run" in unable.watchdog.problem


def test_a_vm_runs_where_its_lease_is(world: World) -> None:
    one, two = world.host(1), world.host(2)
    spec = world.shared.start_new(one)
    assert holds(one, spec)
    assert not starts(two, spec)
    leave = LeaveLockspace(domain_id=world.shared.domain_id, path=world.shared.path("lockspace"))
    with pytest.raises(Refused, match=r"holds 1 leases .* would kill"):
        give(one, LEAVE_LOCKSPACE, leave, state=world.shared.domain_id)

    give(two, ADMIT_MIGRATION, AdmitMigration(vm_id=spec.vm_id, spec=spec))
    one.exec(["virsh", "migrate", "--live", "--p2p", spec.name, two.libvirt_uri])
    assert (runs(one, spec), runs(two, spec)) == (False, True)
    assert (holds(one, spec), holds(two, spec)) == (False, True)
    assert not starts(one, spec)

    stop(two, spec)
    start(one, spec)
    stop(one, spec)
    start(one, spec)
    stop(one, spec)
    with pytest.raises(Refused, match="has not joined the lockspace"):
        start(world.host(4), spec)


def test_a_lost_lease_ends_what_held_it_before_another_host_takes_it(world: World) -> None:
    """Frozen with a watchdog (1): reset, then taken, also the volume that a tool there was writing. Without (3): taken while
    it lives, so it proves nothing.

    Storage lost (2): its VM ends and the host lives on. The same with reset_host (4): the host is reset, too.
    """
    one, two, three, four = (world.host(number) for number in range(1, 5))
    shared, other = world.shared, world.other
    with ThreadPoolExecutor() as pool:
        places = ((shared, one), (shared, three), (other, two), (other, four))
        frozen, unwatched, lost, _ = pool.map(lambda place: place[0].start_new(place[1]), places)
    boots = {host.number: boot_of(host) for host in (one, two, three, four)}
    facts = {host.number: report(host) for host in (one, three)}
    joined = {number: fact.lockspaces[0] for number, fact in facts.items()}

    volume = shared.begin_writing(one)
    one.freeze()
    left = shared.content(volume.key).read_bytes()[:8]
    three.freeze()
    other.outside("lockspace").write_bytes(b"")  # no host can renew in it any more
    before = {number: shared.read(two, number) for number in (1, 3)}
    until(lambda: not runs(two, lost) or None, "the VM whose lease was lost has ended", 120)
    assert proven(before[1], 30.0, joined[1], facts[1].ability.watchdog) is ExpiredLease.NOTHING

    taken = until(lambda: shared.takes(two, volume, "two"), "the volume could be written elsewhere", 200)
    assert ended(boots[1]), "whoever wrote it ended first"
    assert taken == left, "nothing was written since it stood still"
    until(lambda: starts(two, frozen) or None, "the frozen host's VM could be started elsewhere", 60)
    until(lambda: starts(two, unwatched) or None, "the other frozen host's VM, too", 60)
    assert not ended(boots[3])
    assert three.pids("qemu-system-x86_64")  # what a second one may not join
    until(lambda: ended(boots[4]) or None, "the host that must not outlive its lease was reset", 60)
    assert not ended(boots[2])

    for number, proof in ((1, ExpiredLease.NO_HOLDERS), (3, ExpiredLease.NOTHING)):
        now = until(
            lambda number=number: expired(world, before[number], number), "its lease is long enough unchanged"
        )
        assert proven(*now, joined[number], facts[number].ability.watchdog) is proof
    assert shared.content(volume.key).read_bytes() == b"two     " * 512


def expired(world: World, before: HostLeaseReading, number: int) -> tuple[HostLeaseReading, float] | None:
    now = world.shared.read(world.host(2), number)
    unchanged = unchanged_seconds(before, now)
    return (now, unchanged) if unchanged > 80 else None
