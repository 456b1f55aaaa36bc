"""What can be done to a volume: create, resize, delete, copy, inspect; qemu-img does it, in children.

A file volume comes into being under another name and gets its own when it is whole, so that a volume that
exists is a good one. One order at a time works on a volume of this host.
"""

from __future__ import annotations

from collections.abc import Sequence

from host_agent import direct, images, luns, places
from host_agent.action import Action, Host, Running, to_its_end, whole
from host_agent.config import AgentConfig
from host_agent.leased import Hold
from host_agent.places import Place
from volery.contracts.base import Done
from volery.contracts.domain import FileSource, ImageFormat, IscsiSource, VolumeSource
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found
from volery.contracts.ids import is_id
from volery.contracts.volume_orders import (
    COPY_VOLUME,
    CREATE_VOLUME,
    DELETE_VOLUME,
    INSPECT_VOLUME,
    RESIZE_VOLUME,
    CopyVolume,
    CreateVolume,
    DeleteVolume,
    InspectVolume,
    ResizeVolume,
    VolumeInfo,
)

SECTOR_BYTES = 512
CREATE_SECONDS = 3600.0
WIPE_SECONDS = 24 * 3600.0
CONVERT_SECONDS = 24 * 3600.0
CHECK_SECONDS = 600.0


async def create(host: Host, order: CreateVolume, running: Running) -> VolumeInfo:
    """Makes the volume; one of the same disk and size that is already there is the answer (a repeat).

    Raises Refused: another size there (conflict), a LUN that is too small, the storage full (exhausted).
    """
    check_size(order.size_bytes)
    async with luns.writing(host, order.disk_id, order.source, order.lease) as hold:
        if isinstance(order.source, IscsiSource):
            return await luns.existing(host.config, order.source, order.size_bytes)
        place = own_place(host.config, order.disk_id, order.source)
        if (await places.look(place, hold)).exists:
            return same(await describe(order.source), place, order.size_bytes)
        staged = Place(place.root, "staging", f"{place.name}.new")
        await places.remove(staged, hold)
        try:
            await make_file(staged, order.source.format, order.size_bytes, order.preallocate, hold)
            await places.put(place, staged.name, hold, replace=False)
        except BaseException:
            await places.abandon(staged, hold)
            raise
        return await describe(order.source)


def check_size(size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
        raise invalid(
            f"a disk of {size_bytes} bytes can't be made: its size must be whole sectors of 512 bytes"
        )
    if size_bytes > images.MAX_VIRTUAL_BYTES:
        raise invalid(f"a disk of {size_bytes} bytes is too large: at most {images.MAX_VIRTUAL_BYTES} bytes")


def own_place(config: AgentConfig, volume_id: str, source: FileSource) -> Place:
    """The place of a volume that is going to be written: it must carry its own id, a disk's first one the disk's."""
    place = places.locate(config, source)
    if not is_id(volume_id) or place.name != f"{volume_id}.{source.format}":
        raise invalid(
            f"{source.path} isn't the place of disk {volume_id}: it must be named {volume_id}.{source.format}"
        )
    return place


def same(found: VolumeInfo, place: Place, size_bytes: int) -> VolumeInfo:
    """The volume that is there already, if it is the one that was asked for. Raises Refused(conflict)."""
    if found.size_bytes != size_bytes:
        raise conflict(
            f"{place.path} is already there with {found.size_bytes} bytes, not {size_bytes}: "
            "it is another disk's, or was made by hand; remove it first",
            size_bytes=found.size_bytes,
        )
    return found


async def make_file(
    place: Place, format: ImageFormat, size_bytes: int, preallocate: bool, hold: Hold
) -> None:
    """An empty image under a temporary name. Raises Refused(exhausted) when the storage is full."""
    options = "preallocation=falloc" if preallocate else "preallocation=off"
    await images.qemu_img(
        "create",
        ["-q", "-f", format, "-o", options, place.path, str(size_bytes)],
        timeout_seconds=CREATE_SECONDS,
        limits=images.CONVERT_LIMITS,
        hold=hold,
    )


async def describe(source: VolumeSource) -> VolumeInfo:
    """The volume's sizes as qemu-img sees them, running VM or not."""
    info = await images.info(images.source_node(source), source)
    used = info.actual_size if isinstance(source, FileSource) else info.virtual_size
    format = source.format if isinstance(source, FileSource) else ImageFormat.RAW
    return VolumeInfo(size_bytes=info.virtual_size, used_bytes=used, format=format)


async def resize(host: Host, order: ResizeVolume, running: Running) -> VolumeInfo:
    """Grows the volume; the same size is a success (a repeat).

    Raises Refused: smaller (invalid), in use by a running VM (conflict), absent (not_found).
    """
    check_size(order.size_bytes)
    if isinstance(order.source, IscsiSource):
        return await luns.existing(host.config, order.source, order.size_bytes)
    async with luns.writing(host, order.disk_id, order.source, order.lease) as hold:
        place = own_place(host.config, order.volume_id or order.disk_id, order.source)
        if not (await places.look(place, hold)).exists:
            raise not_found("volume", place.path)
        found = await describe(order.source)
        if order.size_bytes < found.size_bytes:
            raise invalid(
                f"disk {order.disk_id} has {found.size_bytes} bytes and can't shrink to {order.size_bytes}: "
                "what is beyond the new end would be lost",
                size_bytes=found.size_bytes,
            )
        if order.size_bytes > found.size_bytes:
            node = images.address(images.file_node(place.path, order.source.format))
            await images.qemu_img(
                "resize", ["-q", node, str(order.size_bytes)], timeout_seconds=CHECK_SECONDS, hold=hold
            )
        return await describe(order.source)


async def delete(host: Host, order: DeleteVolume, running: Running) -> Done:
    """Removes the volume and whatever of it still waits in staging; absent is a success. `wipe` zeroes it first; a LUN
    always ends up blank.

    Raises Refused(conflict) while a running VM has it open.
    """
    async with luns.writing(host, order.disk_id, order.source, order.lease) as hold:
        if isinstance(order.source, IscsiSource):
            await luns.blank(host, order.source, wipe=order.wipe, running=running, hold=hold)
            return Done()
        place = own_place(host.config, order.volume_id or order.disk_id, order.source)
        await places.remove(Place(place.root, "staging", f"{place.name}.new"), hold)
        # The last step: whoever cancels after it is told that the volume is gone.
        removing = places.remove(place, hold, wipe=order.wipe, timeout_seconds=WIPE_SECONDS)
        await (removing if order.wipe else to_its_end(removing))
        return Done()


async def copy(host: Host, order: CopyVolume, running: Running) -> VolumeInfo:
    """Copies one volume into another, which comes into being with it; holes stay holes.

    Raises Refused: source in use or absent, target there with another size, LUN too small, storage full.
    """
    check_size(order.size_bytes)
    async with luns.writing(host, order.disk_id, order.target, order.lease) as hold:
        if isinstance(order.source, FileSource):
            place = places.locate(host.config, order.source)
            if not (await places.look(place, hold)).exists:
                raise not_found("volume", place.path)
        else:
            places.check_lun(host.config, order.source)
        size = (await describe(order.source)).size_bytes
        if size > order.size_bytes:
            raise invalid(
                f"the source has {size} bytes and doesn't fit into {order.size_bytes}", size_bytes=size
            )
        node = images.source_node(order.source)
        return await fill(
            host.config, order.disk_id, order.target, order.size_bytes, node, order.source, running, hold
        )


async def fill(
    config: AgentConfig,
    disk_id: str,
    target: VolumeSource,
    size_bytes: int,
    node: images.Node,
    login: VolumeSource | None,
    running: Running,
    hold: Hold,
    *,
    replace: bool = False,
) -> VolumeInfo:
    """Converts an image into a volume: a file gets its name when it is whole; a LUN is overwritten in place."""
    if isinstance(target, IscsiSource):
        return await _fill_lun(config, target, size_bytes, node, login, running, hold)
    place = own_place(config, disk_id, target)
    if not replace and (await places.look(place, hold)).exists:
        if running.resumed:
            return same(await describe(target), place, size_bytes)
        raise conflict(
            f"{place.path} is already there: delete that volume first, or give the disk another id"
        )
    staged = Place(place.root, "staging", f"{place.name}.new")
    await places.remove(staged, hold)
    try:
        await make_file(staged, target.format, size_bytes, False, hold)
        made = images.file_node(staged.path, target.format)
        await _convert(node, login, made, None, running, hold, ["--target-is-zero"])
        await places.put(place, staged.name, hold, replace=replace)
    except BaseException:
        await places.abandon(staged, hold)
        raise
    return await describe(target)


async def _fill_lun(
    config: AgentConfig,
    target: IscsiSource,
    size_bytes: int,
    node: images.Node,
    login: VolumeSource | None,
    running: Running,
    hold: Hold,
) -> VolumeInfo:
    found = await luns.existing(config, target, size_bytes)
    source_size = (await images.info(node, login)).virtual_size
    if source_size > found.size_bytes:
        raise invalid(f"the image holds {source_size} bytes, more than LUN {target.lun}'s {found.size_bytes}")
    await _convert(node, login, images.source_node(target), target, running, hold, [])
    if source_size < found.size_bytes:  # what an earlier user of the LUN left there is nobody's to read
        await luns.zero(target, source_size, found.size_bytes, hold, lambda percent: None)
    return await describe(target)


async def _convert(
    node: images.Node,
    login: VolumeSource | None,
    target: images.Node,
    target_login: VolumeSource | None,
    running: Running,
    hold: Hold,
    options: Sequence[str],
) -> None:
    def tell(progress: float) -> None:
        running.progress(progress, {})

    async def convert(caches: Sequence[str]) -> None:
        with (
            images.secrets(login) as (source_arguments, source_descriptors),
            images.secrets(target_login, images.TARGET_SECRET) as (target_arguments, target_descriptors),
        ):
            named = images.with_secret(target, images.TARGET_SECRET) if target_login is not None else target
            await images.qemu_img(
                "convert",
                [
                    *("-n", "-p", *caches, "-O", target["driver"]),  # -O overrides the node's own driver
                    *(*options, *source_arguments, *target_arguments),
                    *(images.address(node), images.address(named)),
                ],
                timeout_seconds=CONVERT_SECONDS,
                limits=images.CONVERT_LIMITS,
                pass_fds=(*source_descriptors, *target_descriptors),
                hold=hold,
                on_progress=tell,
            )

    await direct.converted(convert)


async def inspect(host: Host, order: InspectVolume, running: Running) -> VolumeInfo:
    """Checks a volume's image as if a stranger had made it. Raises Refused(invalid) with the rule that it breaks."""
    if isinstance(order.source, IscsiSource):
        found = await luns.existing(host.config, order.source, SECTOR_BYTES)
        if order.max_bytes and found.size_bytes > order.max_bytes:
            raise invalid(
                f"LUN {order.source.lun} has {found.size_bytes} bytes; at most {order.max_bytes} are allowed"
            )
        return found
    place = places.locate(host.config, order.source)
    file = await places.look(place)
    if not file.exists:
        raise not_found("volume", place.path)
    if file.in_use:
        raise Refused(
            Kind.CONFLICT, f"{place.path} is in use by a running VM: stop it, then inspect its image"
        )
    head = bytes.fromhex(file.head)
    if images.detect(head, file.size_bytes) != order.source.format:
        raise invalid(
            f"{place.path} is {images.detect(head, file.size_bytes)}, though its name says {order.source.format}",
            rule="format",
        )
    info = await images.examine(
        place.path, head, file.size_bytes, order.max_bytes, timeout_seconds=CHECK_SECONDS
    )
    return VolumeInfo(size_bytes=info.virtual_size, used_bytes=info.actual_size, format=order.source.format)


ACTIONS = (
    Action(CREATE_VOLUME, create),
    Action(RESIZE_VOLUME, whole(resize)),
    Action(DELETE_VOLUME, delete),
    Action(COPY_VOLUME, copy),
    Action(INSPECT_VOLUME, inspect),
)
