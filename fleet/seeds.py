"""The objects of a fleet, written as inventory writes them: hosts that are enrolled and VMs that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bench.world import Pool
from services.inventory.store import CLUSTERS, DATA_CENTERS, HOSTS, VMS, HostPrivate, VmPrivate
from volery.contracts.cluster import Cluster, DataCenter
from volery.contracts.host import Host
from volery.contracts.ids import new_id
from volery.contracts.vm import DesiredState, Vm, VmStatus
from volery.runtime.signing import Key
from volery.runtime.tables import Change, Nothing, commit

CLUSTER_HOSTS = 100
"""Hosts of a cluster: what administrators make of them."""
BATCH = 200
VM_BYTES = 1 << 30
VCPUS = 1

Tell = Callable[[str], None]
"""Says how far it is."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """A host, its agent's key, and what runs there."""

    host: Host
    key: Key
    vms: tuple[Vm, ...]


def _base() -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"id": new_id(), "revision": 1, "created_at": now, "updated_at": now}


async def seed(inventory: Pool, hosts: int, vms: int, tell: Tell) -> list[Seeded]:
    """Enrolled hosts, and VMs that run there; what the services learn of them they learn from facts."""
    center = DataCenter(name="fleet", **_base())
    await commit(inventory, [DATA_CENTERS.insert(center, Nothing())])
    clusters = [
        Cluster(name=f"fleet{number:03d}", data_center_id=center.id, **_base())
        for number in range(-(-hosts // CLUSTER_HOSTS))
    ]
    await _insert(inventory, [CLUSTERS.insert(cluster, Nothing()) for cluster in clusters], "clusters", tell)
    made = [
        _host(number, clusters[number // CLUSTER_HOSTS], _share(vms, hosts, number))
        for number in range(hosts)
    ]
    await _insert(
        inventory,
        [HOSTS.insert(one.host, HostPrivate(public_key=one.key.public)) for one in made],
        "hosts",
        tell,
    )
    running = [vm for one in made for vm in one.vms]
    await _insert(inventory, [VMS.insert(vm, VmPrivate()) for vm in running], "VMs", tell)
    await inventory.executemany(
        "insert into placement (vm_id, epoch, host_id, state) values ($1, 1, $2, 'running')",
        [(vm.id, vm.host_id) for vm in running],
    )
    return made


async def _insert(pool: Pool, changes: Sequence[Change], what: str, tell: Tell) -> None:
    for number, batch in enumerate(_batches(changes)):
        await commit(pool, batch)
        if number % 20 == 0:
            tell(f"writing {what}: {min(len(changes), (number + 1) * BATCH):,} of {len(changes):,}")


def _batches(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    for at in range(0, len(changes), BATCH):
        yield changes[at : at + BATCH]


def _share(vms: int, hosts: int, number: int) -> int:
    return vms // hosts + (number < vms % hosts)


def _host(number: int, cluster: Cluster, vms: int) -> Seeded:
    key = Key.new("user")
    host = Host(
        name=f"host{number:05d}",
        cluster_id=cluster.id,
        data_center_id=cluster.data_center_id,
        enrolled_at=datetime.now(UTC),
        address="127.0.0.1",
        **_base(),
    )
    return Seeded(host, key, tuple(_vm(f"vm{number:05d}-{n:02d}", host) for n in range(vms)))


def _vm(name: str, host: Host) -> Vm:
    return Vm(
        name=name,
        cluster_id=host.cluster_id,
        data_center_id=host.data_center_id,
        status=VmStatus.UP,
        desired=DesiredState.UP,
        host_id=host.id,
        epoch=1,
        memory_bytes=VM_BYTES,
        vcpus=VCPUS,
        allowed_actions=("stop", "migrate", "update"),
        **_base(),
    )
