"""Volumes above others: an overlay is made, or merged into what is below it; and the files below one are what its owner says, or nothing is opened.

The owner of a disk says its whole chain; the files' headers say it, too, each the next one. QEMU is told the former and
never reads the latter, so a file whose header says something else would show a guest what was never its disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import msgspec

from host_agent import direct, images, luns, places, volumes
from host_agent.action import Action, Host, Running
from host_agent.config import AgentConfig
from host_agent.leased import FREE, Hold
from host_agent.places import Place
from volery.contracts.agent import OpenChain, StorageDomainReport
from volery.contracts.domain import BackingFile, ChainSource, DomainDisk, FileSource
from volery.contracts.errors import Refused, conflict, invalid, not_found
from volery.contracts.volume_orders import MAKE_OVERLAY, MERGE_VOLUME, MakeOverlay, MergeVolume, VolumeInfo

BROKEN = "chain"
"""The rule of refusals for files that aren't above each other as their owner says."""


class _Files(msgspec.Struct):
    """Request to `host_agent.files`: below. Root and name of each."""

    files: list[tuple[str, str]]


class _Names(msgspec.Struct):
    names: list[str | None]


def _levels(source: FileSource) -> list[BackingFile]:
    """From the volume itself to its base."""
    below = source.backing if isinstance(source, ChainSource) else ()
    return [BackingFile(path=source.path, format=source.format), *below]


async def check(config: AgentConfig, chains: Sequence[Sequence[BackingFile]], hold: Hold = FREE) -> None:
    """Raises Refused unless in each of these chains every file names the next one as the file below it, and the last none."""
    levels = [(_place(config, file), names) for chain in chains for file, names in _expected(chain)]
    if not levels:
        return
    request = _Files([(place.root, place.name) for place, _ in levels])
    found = (await places.ask("below", request, _Names, hold=hold.reading)).names
    for (place, names), name in zip(levels, found, strict=True):
        if name is None:
            raise not_found("volume", place.path)
        if name not in names:
            raise conflict(
                f"{place.path} says that {name or 'nothing'} is below it, and it should be {names[0] or 'nothing'}: the "
                "files were changed by hand, or Volery's database is older than they are; nothing was opened. Put the "
                "files right, then refresh the storage domain",
                rule=BROKEN,
                path=place.path,
                below=name,
            )


def _expected(chain: Sequence[BackingFile]) -> Iterable[tuple[BackingFile, list[str]]]:
    """Each file with what its header may call the one below: all of them lie in one directory."""
    for number, file in enumerate(chain):
        below = chain[number + 1 :]
        names = [PurePath(one.path).name for one in below] + [""]
        merging = bool(below) and below[0].merging
        yield file, names[: 2 if merging else 1]


def _place(config: AgentConfig, file: BackingFile) -> Place:
    return places.locate(config, FileSource(path=file.path, format=file.format))


async def check_disks(config: AgentConfig, disks: Iterable[DomainDisk]) -> None:
    """Before a guest gets these disks. Of a disk with one file only the owner knows it from every host's reports, so that
    most starts need no look at the storage."""
    await check(config, [_levels(disk.source) for disk in disks if isinstance(disk.source, ChainSource)])


async def overlay(host: Host, order: MakeOverlay, running: Running) -> VolumeInfo:
    """Makes the volume; one that is already there, above the right file and with that size, is the answer (a repeat).

    Raises Refused: files that aren't as the source says (conflict, rule `chain`), the one below in use (conflict) or
    larger (invalid), the storage full (exhausted).
    """
    volumes.check_size(order.size_bytes)
    async with luns.writing(host, order.disk_id, order.source, order.lease) as hold:
        place = volumes.own_place(host.config, order.volume_id, order.source)
        levels = _levels(order.source)
        below = _place(host.config, levels[1])
        if below.root != place.root:
            raise invalid(f"{below.path} and {place.path} must lie in one storage domain")
        if (await places.look(place, hold)).exists:
            await check(host.config, [levels], hold)
            return volumes.same(await volumes.describe(order.source), place, order.size_bytes)
        await check(host.config, [levels[1:]], hold)
        await _refuse_below(order, below, hold)
        staged = Place(place.root, "staging", f"{place.name}.new")
        await places.remove(staged, hold)
        try:
            await _make(staged, below, order, hold)
            await places.put(place, staged.name, hold, replace=False)
        except BaseException:  # also when it is cancelled: nothing half made stays
            await places.abandon(staged, hold)
            raise
        return await volumes.describe(order.source)


async def _refuse_below(order: MakeOverlay, below: Place, hold: Hold) -> None:
    if not order.live and (await places.look(below, hold)).in_use:
        raise conflict(f"{below.path} is in use by a running VM: stop it first", rule="image_held")
    first, *rest = order.source.backing
    source = FileSource(path=first.path, format=first.format)
    if rest:
        source = ChainSource(path=first.path, format=first.format, backing=tuple(rest))
    size = (await volumes.describe(source)).size_bytes
    if size > order.size_bytes:
        raise invalid(
            f"{below.path} has {size} bytes: a volume of {order.size_bytes} above it would hide its end",
            size_bytes=size,
        )


async def _make(staged: Place, below: Place, order: MakeOverlay, hold: Hold) -> None:
    """The file below is named as it is seen from where the new one will be, which isn't where it is made."""
    await images.qemu_img(
        "create",
        [
            *("-q", "-u", "-f", order.source.format, "-b", below.name, "-F", order.source.backing[0].format),
            *(staged.path, str(order.size_bytes)),
        ],
        timeout_seconds=volumes.CHECK_SECONDS,
        limits=images.CONVERT_LIMITS,
        hold=hold,
    )


async def merge(host: Host, order: MergeVolume, running: Running) -> VolumeInfo:
    """What is read from the volume, or from above it, is the same at every moment of this, and after its end also without it.

    Raises Refused: files that aren't as said, or in use (conflict), the storage full (exhausted).
    """
    async with luns.writing(host, order.disk_id, order.source, order.lease) as hold:
        volume, below, *rest = _levels(order.source)
        above = [] if order.above is None else _levels(order.above)
        chain = [*above, msgspec.structs.replace(volume, merging=True), below, *rest]
        await check(host.config, [chain], hold)
        for file in (*above, volume, below):
            place = _place(host.config, file)
            if (await places.look(place, hold)).in_use:
                raise conflict(f"{place.path} is in use by a running VM: stop it first", rule="image_held")
        await _commit(order.source, running, hold)
        for file in above:
            await _put_above(file, below, hold)
        return await volumes.describe(FileSource(path=below.path, format=below.format))


async def _commit(source: ChainSource, running: Running, hold: Hold) -> None:
    """Its headers were checked: qemu-img goes by them, and grows the file below if that is smaller."""
    node = {"driver": source.format, "file": {"driver": "file", "filename": source.path}}

    async def commit(cache: str) -> None:
        await images.qemu_img(
            "commit",
            ["-p", "-d", "-t", cache, images.address(node)],
            timeout_seconds=volumes.CONVERT_SECONDS,
            limits=images.CONVERT_LIMITS,
            hold=hold,
            on_progress=lambda percent: running.progress(percent, {}),
        )

    await direct.tried(commit)


async def _put_above(above: BackingFile, below: BackingFile, hold: Hold) -> None:
    """Only the name in its header changes: both files below hold the same."""
    name = PurePath(below.path).name
    node = images.address(images.file_node(above.path, above.format))
    await images.qemu_img(
        "rebase",
        ["-q", "-u", "-b", name, "-F", below.format, node],
        timeout_seconds=volumes.CHECK_SECONDS,
        hold=hold,
    )


async def with_open(host: Host, reports: Sequence[StorageDomainReport]) -> tuple[StorageDomainReport, ...]:
    """These reports, with what the host's VMs have open there. Nobody is asked where no file is above another one."""
    if not any(volume.backing for report in reports for volume in report.volumes):
        return tuple(reports)
    try:
        async with asyncio.timeout(luns.HYPERVISOR_SECONDS):
            found = await host.hypervisor.open_chains()
    except (Refused, TimeoutError):
        return tuple(reports)
    return tuple(_with(report, found) for report in reports)


def _with(report: StorageDomainReport, found: Iterable[tuple[str, OpenChain]]) -> StorageDomainReport:
    there = tuple(chain for path, chain in found if f"/{report.domain_id}/disks/" in path)
    return msgspec.structs.replace(report, open_chains=there)


ACTIONS = (Action(MAKE_OVERLAY, overlay), Action(MERGE_VOLUME, merge))
