"""What may happen together with a disk: every cell of the table that storage decides, by the service itself.

Each pair has a disk of its own. What holds it is begun and held where its host would be at work, or is a VM of that status;
then the newcomer is asked for. `CELLS` is what is played here: tests/contracts/test_together.py counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import Site, site
from tests.storage.test_disks import attach
from tests.storage.test_merges import forget, revert
from tests.storage.test_snapshots import snapshot
from tests.storage.test_transfers import DOWNLOAD, UPLOAD, opened
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, Operation
from volery.contracts.storage import (
    COPY_DISK,
    CREATE_DISK,
    CREATE_TRANSFER,
    DELETE_DISK,
    FINISH_DISK_TRANSFER,
    PREPARE_DISKS,
    RESIZE_DISK,
    UPDATE_DISK,
    CopyDisk,
    CreateDisk,
    CreateTransfer,
    Disk,
    FinishDiskTransfer,
    PrepareDisks,
    ResizeDisk,
    StorageDomain,
    UpdateDisk,
)
from volery.contracts.together import HELD, TABLE, Outcome, Work
from volery.contracts.vm import Vm, VmStatus
from volery.contracts.volume_orders import (
    COPY_VOLUME,
    CREATE_VOLUME,
    DELETE_VOLUME,
    FINISH_TRANSFER,
    MAKE_OVERLAY,
    MERGE_VOLUME,
    RESIZE_VOLUME,
)
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings

W = Work
OPENERS = (W.START, W.RESTART, W.MIGRATE, W.DEVICES)
"""Whose VM opens the disk."""
OWN = (W.EDIT, W.RESIZE, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE)
"""Done with the disk itself."""
CHAIN = (W.SNAPSHOT, W.MERGE)
"""Done with the disk's volumes, for a VM."""
OF_DISKS = (W.FILL, W.RESIZE, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE, W.SNAPSHOT, W.MERGE)
NEVER_MEET: Mapping[tuple[Work, Work], str] = {
    (W.FILL, W.MERGE): "a disk that is being made has no snapshot yet",
    (W.UPLOAD, W.MERGE): "nothing is uploaded into a disk with snapshots, and none is made of it meanwhile",
}
"""Holder and newcomer → why one is never there when the other comes. The reasons are tested, too."""
STATUSES: tuple[tuple[Work, VmStatus], ...] = (
    (W.CREATE, VmStatus.IMAGE_LOCKED),
    (W.START, VmStatus.WAIT_FOR_LAUNCH),
    (W.START, VmStatus.RESTORING_STATE),
    (W.RESTART, VmStatus.WAIT_FOR_LAUNCH),
    (W.RUN, VmStatus.UP),
    (W.STOP, VmStatus.POWERING_DOWN),
    (W.CONTROL, VmStatus.UP),
    (W.SUSPEND, VmStatus.SAVING_STATE),
    (W.SUSPEND, VmStatus.SUSPENDED),
    (W.MIGRATE, VmStatus.MIGRATING),
    (W.DEVICES, VmStatus.UP),
    (W.DELETE, VmStatus.DELETING),
)
"""What is done with a VM, and how it is shown meanwhile: all that storage hears of it."""
CELLS = frozenset(
    [(holder, newcomer) for holder in OF_DISKS for newcomer in (*OPENERS, *OWN, *CHAIN)]
    + [(holder, newcomer) for holder, _ in STATUSES for newcomer in OWN]
    + [(W.MAINTAIN, newcomer) for newcomer in (*OWN, *CHAIN)]
)
GATED = (
    *(CREATE_VOLUME, COPY_VOLUME, RESIZE_VOLUME, DELETE_VOLUME, FINISH_TRANSFER),
    *(MAKE_OVERLAY, MERGE_VOLUME),
)
AT_ONCE = 12


@dataclass
class Scene:
    """One pair, and the disk that it is about."""

    holder: Work
    newcomer: Work
    disk: Disk
    vm: Vm
    read_only: bool = False
    """The VM only reads the disk."""
    finishing: bool = False
    """The upload has been sent, and is being put into the disk."""
    reverting: bool = False
    """The disk goes back to its snapshot; else that is deleted."""
    snapshot_id: str = ""
    """Of the snapshot that is deleted or reverted to."""
    status: VmStatus = VmStatus.DOWN
    held_by: str = ""
    """The id by which a refusal names the holder."""

    @property
    def name(self) -> str:
        more = " finishing" * self.finishing + " reading" * self.read_only + " reverting" * self.reverting
        return f"{self.holder} ({self.status}){more}, then {self.newcomer}"

    @property
    def expected(self) -> Outcome:
        found = TABLE[self.holder, self.newcomer]
        return Outcome.TOGETHER if self.read_only and found.unless_reading else found.outcome


# What holds a disk: begun here, it stays as it is until the gates open.


async def fill(at: Site, scene: Scene) -> str:
    ask = CreateDisk(
        name=scene.disk.name,
        storage_domain_id=scene.disk.storage_domain_id,
        size_bytes=GIB,
        attach_to=scene.vm.id,
    )
    op = await at.bus.ask(CREATE_DISK, ask)
    scene.disk = await at.disk(op.object_id)
    return op.id


async def copy(at: Site, scene: Scene) -> str:
    return (await at.bus.ask(COPY_DISK, CopyDisk(id=scene.disk.id, name="a copy"))).id


async def resize(at: Site, scene: Scene) -> str:
    return (await at.bus.ask(RESIZE_DISK, ResizeDisk(id=scene.disk.id, size_bytes=2 * GIB))).id


async def upload(at: Site, scene: Scene) -> str:
    transfer = await opened(at, scene.disk, UPLOAD)
    if not scene.finishing:
        return transfer.id
    return (await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id))).id


async def download(at: Site, scene: Scene) -> str:
    return (await opened(at, scene.disk, DOWNLOAD)).id


async def remove(at: Site, scene: Scene) -> str:
    return (await at.bus.ask(DELETE_DISK, DeleteById(id=scene.disk.id))).id


async def snap(at: Site, scene: Scene) -> str:
    return (await snapshot(at, scene.disk)).id


async def unsnap(at: Site, scene: Scene) -> Operation:
    return await (revert if scene.reverting else forget)(at, scene.snapshot_id)


async def merge(at: Site, scene: Scene) -> str:
    return (await unsnap(at, scene)).id


HOLD: dict[Work, Callable[[Site, Scene], Awaitable[str]]] = {
    W.FILL: fill,
    W.RESIZE: resize,
    W.COPY: copy,
    W.UPLOAD: upload,
    W.DOWNLOAD: download,
    W.REMOVE: remove,
    W.SNAPSHOT: snap,
    W.MERGE: merge,
}

# What comes. It is let in when it is answered: what it then does is held like the rest.


async def opens(at: Site, scene: Scene) -> object:
    host_id = at.rows[1].id
    ask = PrepareDisks(vm_id=scene.vm.id, host_id=host_id, disk_ids=(scene.disk.id,), work=scene.newcomer)
    return await at.bus.ask(PREPARE_DISKS, ask)


async def come(at: Site, scene: Scene) -> object:
    disk_id = scene.disk.id
    if scene.newcomer in OPENERS:
        return await opens(at, scene)
    if scene.newcomer is W.EDIT:
        return await at.bus.ask(UPDATE_DISK, UpdateDisk(id=disk_id, description="edited"))
    if scene.newcomer in (W.UPLOAD, W.DOWNLOAD):
        size = GIB // 2 if scene.newcomer is W.UPLOAD else 0
        direction = UPLOAD if scene.newcomer is W.UPLOAD else DOWNLOAD
        ask = CreateTransfer(disk_id=disk_id, direction=direction, size_bytes=size)
        return await at.bus.ask(CREATE_TRANSFER, ask)
    if scene.newcomer is W.REMOVE:
        return await at.bus.ask(DELETE_DISK, DeleteById(id=disk_id))
    if scene.newcomer is W.SNAPSHOT:
        return await snapshot(at, scene.disk)
    if scene.newcomer is W.MERGE:
        return await unsnap(at, scene)
    if scene.newcomer is W.COPY:
        return await at.bus.ask(COPY_DISK, CopyDisk(id=disk_id, name="another copy"))
    return await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk_id, size_bytes=3 * GIB))


async def refusal(asked: Awaitable[object]) -> Refused | None:
    try:
        await asked
    except Refused as refused:
        return refused
    return None


async def outcome(at: Site, scene: Scene) -> Outcome:
    """What became of the newcomer. One that waits is told what it waits for, like one that is refused: who waits is its
    asker, in inventory."""
    refused = await refusal(come(at, scene))
    if refused is None:
        return Outcome.TOGETHER
    if "attached to VM" not in refused.message:
        assert refused.details["rule"] == HELD, refused.message
        assert scene.held_by in (refused.details.get(k) for k in ("operation", "transfer_id", "vm_id"))
        assert f"disk {scene.disk.name} can't be " in refused.message
        assert scene.held_by in refused.message or scene.vm.name in refused.message
        assert ": " in refused.message
    return Outcome.WAITS if scene.expected is Outcome.WAITS else Outcome.REFUSED


async def each(work: Callable[[Scene], Awaitable[None]], scenes: list[Scene]) -> None:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(scene: Scene) -> None:
        async with turn:
            await work(scene)

    await asyncio.gather(*map(one, scenes))


async def new_scene(
    at: Site, domain: StorageDomain, number: int, holder: Work, newcomer: Work, **more: bool
) -> Scene:
    vm = await at.world.vm(at.center, f"v{number}")
    if holder is W.FILL:
        blank = await at.new_disk(domain, f"d{number}") if not number else None
        disk = blank or Disk(
            id="",
            name=f"d{number}",
            storage_domain_id=domain.id,
            data_center_id=at.center.id,
            revision=0,
            created_at=vm.created_at,
            updated_at=vm.updated_at,
        )
    else:
        disk = await at.new_disk(domain, f"d{number}")
    scene = Scene(holder, newcomer, disk, vm, **more)
    if W.MERGE in (holder, newcomer):
        scene.snapshot_id = new_id()
        await at.done(await snapshot(at, disk, snapshot_id=scene.snapshot_id))
    if holder not in (W.FILL, W.REMOVE) and newcomer in OPENERS:
        await attach(at, disk, vm.id, read_only=scene.read_only)
    return scene


async def wrong(at: Site, scenes: list[Scene]) -> dict[str, str]:
    """Pairs for which storage does something else than the table says."""
    found: dict[str, str] = {}

    async def play(scene: Scene) -> None:
        real = await outcome(at, scene)
        if real is not scene.expected:
            found[scene.name] = f"{real}, not {scene.expected}"

    await each(play, scenes)
    return found


async def test_every_cell_of_what_is_done_with_a_disk(configured: Settings) -> None:
    newcomers = (*OPENERS, *OWN, *CHAIN)
    kinds = [(h, n, {}) for h in OF_DISKS for n in newcomers]
    kinds += [(W.UPLOAD, n, {"finishing": True}) for n in newcomers]
    kinds += [(h, n, {"read_only": True}) for h in (W.COPY, W.DOWNLOAD) for n in OPENERS]
    kinds += [(h, W.MERGE, {"reverting": True}) for h in OF_DISKS]
    kinds += [(W.MERGE, n, {"reverting": True}) for n in newcomers]
    kinds = [(h, n, more) for h, n, more in kinds if (h, n) not in NEVER_MEET]
    async with site(configured) as at:
        domain, gate = await at.new_domain(), asyncio.Event()
        scenes = [await new_scene(at, domain, i, h, n, **more) for i, (h, n, more) in enumerate(kinds)]
        for host in at.hosts:
            host.held.update({order.kind: gate for order in GATED})

        async def hold(scene: Scene) -> None:
            scene.held_by = await HOLD[scene.holder](at, scene)

        await each(hold, scenes)
        assert await wrong(at, scenes) == {}
        # What waits comes in as soon as nothing is done with the disk any more.
        waiting = [s for s in scenes if s.expected is Outcome.WAITS and s.holder is not W.REMOVE]
        assert {s.holder for s in waiting} == {*OF_DISKS} - {W.REMOVE}
        gate.set()

        async def comes_in(scene: Scene) -> None:
            if scene.held_by.startswith("storage-"):
                await at.done(Operation(id=scene.held_by, **stamp(scene)))
            else:
                await at.done(await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=scene.held_by)))
            await come(at, scene)

        await each(comes_in, waiting)


def stamp(scene: Scene) -> dict[str, object]:
    """What an operation has besides its id."""
    disk = scene.disk
    return {
        "revision": 1,
        "created_at": disk.created_at,
        "updated_at": disk.updated_at,
        "kind": "",
        "object_kind": "disk",
        "object_id": disk.id,
        "deadline": disk.created_at,
    }


async def test_every_cell_of_what_is_done_with_a_vm_or_its_host(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        scenes = []
        for holder, status in STATUSES:
            for newcomer in OWN:
                for read_only in (False, True):
                    scene = await new_scene(at, domain, len(scenes), holder, newcomer, read_only=read_only)
                    await attach(at, scene.disk, scene.vm.id, read_only=read_only)
                    scene.status, scene.held_by = status, scene.vm.id
                    scenes.append(scene)
        for scene in scenes:
            await at.world.vm(at.center, scene.vm.name, vm_id=scene.vm.id, status=scene.status)
        await heard(configured, {scene.vm.id: str(scene.status) for scene in scenes})
        gate = asyncio.Event()
        for host in at.hosts:
            host.held.update({order.kind: gate for order in GATED})
        assert await wrong(at, scenes) == {}
        gate.set()

        leaving = at.rows[0]
        disks = [
            await new_scene(at, domain, len(scenes) + n, W.MAINTAIN, newcomer)
            for n, newcomer in enumerate((*OWN, *CHAIN))
        ]
        status = HostStatus.PREPARING_FOR_MAINTENANCE
        await at.world.host(at.center, leaving.id, leaving.name, status=status)
        assert await wrong(at, disks) == {}


async def test_what_never_meets_has_its_reason(configured: Settings) -> None:
    async with site(configured) as at:
        domain, gate = await at.new_domain(), asyncio.Event()
        old = await new_scene(at, domain, 1, W.MERGE, W.UPLOAD)
        scenes = [
            await new_scene(at, domain, 2 + n, holder, W.SNAPSHOT) for n, (holder, _) in enumerate(NEVER_MEET)
        ]
        for host in at.hosts:
            host.held.update({order.kind: gate for order in GATED})
        with pytest.raises(Refused, match="1 snapshots") as refused:
            await come(at, old)
        assert refused.value.details["rule"] == "snapshots"
        for scene in scenes:
            scene.snapshot_id = new_id()
            scene.held_by = await HOLD[scene.holder](at, scene)
            assert await outcome(at, scene) is scene.expected is Outcome.REFUSED
            assert [volume.snapshot_id for volume in (await at.disk(scene.disk.id)).volumes] == [""]
            for scene.reverting in (False, True):
                with pytest.raises(Refused) as refused:
                    await unsnap(at, scene)
                assert refused.value.kind is Kind.NOT_FOUND
        gate.set()


async def test_a_disk_is_not_made_shareable_while_a_snapshot_of_it_is_made(configured: Settings) -> None:
    """Edits come at any time; but VMs that share a disk can't go on in another volume."""
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain(), format=ImageFormat.RAW)
        gate = at.hosts[0].held[MAKE_OVERLAY.kind] = asyncio.Event()
        op = await snapshot(at, disk)
        share = UpdateDisk(id=disk.id, shareable=True)
        with pytest.raises(Refused, match="a snapshot of it is being made"):
            await at.bus.ask(UPDATE_DISK, share)
        gate.set()
        await at.done(op)
        with pytest.raises(Refused, match="1 snapshots"):
            await at.bus.ask(UPDATE_DISK, share)


async def heard(configured: Settings, statuses: dict[str, str]) -> None:
    """Until storage has heard how these VMs are."""
    async with open_direct(configured.database, Owner.STORAGE) as connection, asyncio.timeout(15):
        while True:
            rows = await connection.fetch("select id, status from vm")
            if statuses.items() <= {row["id"]: row["status"] for row in rows}.items():
                return
            await asyncio.sleep(0.02)


async def test_a_disk_that_is_held_is_attached_to_nothing_unless_it_is_only_read(
    configured: Settings,
) -> None:
    """Attaching itself opens nothing, so copies and downloads don't mind; what runs is asked when it plugs the disk in."""
    async with site(configured) as at:
        domain, gate = await at.new_domain(), asyncio.Event()
        scenes = [await new_scene(at, domain, i + 1, h, W.EDIT) for i, h in enumerate(OF_DISKS)]
        for host in at.hosts:
            host.held.update({order.kind: gate for order in GATED})
        for scene in scenes:
            scene.held_by = await HOLD[scene.holder](at, scene)
            if scene.holder is W.FILL:
                continue
            refused = await refusal(attach(at, scene.disk, new_id()))
            assert (refused is None) == (scene.holder in (W.COPY, W.DOWNLOAD)), scene.name
            by = "transfer" if scene.holder is W.UPLOAD else "operation"
            assert refused is None or f"can't be attached while {by}" in refused.message
        cancelled = next(scene for scene in scenes if scene.holder is W.COPY)
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=cancelled.held_by))
        gate.set()
