"""Snapshots of a VM through the gateway, by real services, a real agent and qemu-img; what is in the disks is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.storage.test_real_host import MIB, Real, plane, real
from tests.support.agent_host import qemu_io
from tests.support.plane import Plane
from volery.contracts.cluster import GetById
from volery.contracts.storage import GET_DISK, Disk

__all__ = ["plane"]


async def leaf(at: Real, disk_id: str) -> Path:
    disk: Disk = await at.bus.ask(GET_DISK, GetById(id=disk_id))
    volume = next(v for v in disk.volumes if v.id == disk.leaf_id)
    return at.path / at.domain.id / "disks" / f"{volume.id}.{volume.format}"


async def write(at: Real, disk_id: str, pattern: int, at_mib: int) -> None:
    path = await leaf(at, disk_id)
    qemu_io(path, f"write -P {pattern} {at_mib}M 1M", format=path.suffix[1:])


async def holds(at: Real, disk_id: str, *patterns: int) -> None:
    """Fails unless the disk's first megabytes are these."""
    path = await leaf(at, disk_id)
    reads = [f"read -P {pattern} {number}M 1M" for number, pattern in enumerate(patterns)]
    qemu_io(path, *reads, format=path.suffix[1:])


async def got(at: Real, path: str) -> Any:
    answer = await at.http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def deleted(at: Real, path: str) -> None:
    answer = await at.http.delete(path)
    assert answer.status_code == 202, answer.text
    await at.until_succeeded(answer)


async def test_a_vm_goes_back_and_forth_and_its_snapshots_go(plane: Plane, tmp_path: Path) -> None:
    async with real(plane, tmp_path / "domain") as at:
        center = (await got(at, "/clusters"))["items"][0]["id"]
        disks = [
            {"storage_domain_id": at.domain.id, "size_bytes": 16 * MIB, "format": f} for f in ("qcow2", "raw")
        ]
        body = {"name": "db", "cluster_id": center, "memory_bytes": 64 * MIB, "disks": disks}
        vm_id = await at.post("/vms", body)
        one, two = (disk["disk_id"] for disk in (await got(at, f"/vms/{vm_id}"))["disks"])

        async def snapshot(name: str) -> str:
            await at.post(f"/vms/{vm_id}/snapshots", {"name": name})
            found = (await got(at, f"/vms/{vm_id}/snapshots"))["items"]
            return next(str(item["id"]) for item in found if item["name"] == name)

        for disk_id in (one, two):
            await write(at, disk_id, 1, 0)
        first = await snapshot("first")
        for disk_id in (one, two):
            await write(at, disk_id, 2, 1)
        second = await snapshot("second")
        for disk_id in (one, two):
            await write(at, disk_id, 3, 0)
            await holds(at, disk_id, 3, 2, 0)
        said = await got(at, f"/snapshots/{first}")
        assert (said["status"], [d["volume_id"] for d in said["disks"]]) == ("ok", [one, two])
        assert said["configuration"]["memory_bytes"] == 64 * MIB

        newer = await at.http.post(f"/snapshots/{first}/revert")
        assert "newer snapshots" in await at.why_failed(newer)
        await at.post(f"/snapshots/{second}/revert")
        for disk_id in (one, two):
            await holds(at, disk_id, 1, 2, 0)
            await write(at, disk_id, 4, 2)
        kept = await at.http.delete(f"/vms/{vm_id}", params={"delete_disks": "false"})
        assert (kept.status_code, "2 snapshots" in kept.text) == (409, True)
        again = await at.http.post(f"/vms/{vm_id}/snapshots", json={"name": "first"})
        assert again.status_code == 409, again.text

        await deleted(at, f"/snapshots/{first}")
        for disk_id in (one, two):
            await holds(at, disk_id, 1, 2, 4)
        await at.post(f"/snapshots/{second}/revert")
        for disk_id in (one, two):
            await holds(at, disk_id, 1, 2, 0)
            await write(at, disk_id, 5, 3)
        await deleted(at, f"/snapshots/{second}")
        for disk_id in (one, two):
            await holds(at, disk_id, 1, 2, 0, 5)
        files = sorted(path.name for path in (at.path / at.domain.id / "disks").iterdir())
        assert files == sorted((f"{one}.qcow2", f"{two}.raw"))

        third = await snapshot("third")
        await deleted(at, f"/vms/{vm_id}")
        assert (await at.http.get(f"/snapshots/{third}")).status_code == 404
        assert list((at.path / at.domain.id / "disks").iterdir()) == []
