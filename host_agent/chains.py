"""Volumes above others: an overlay is made, and the files below one are what its owner says, or nothing is opened.

The owner of a disk says its whole chain; the files' headers say it, too, each the next one. QEMU is told the former and
never reads the latter, so a file whose header says something else would show a guest what was never its disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import msgspec

from host_agent import images, luns, places, volumes
from host_agent.action import Action, Host, Running
from host_agent.config import AgentConfig
from host_agent.leased import FREE, Hold
from host_agent.places import Place
from volery.contracts.agent import OpenChain, StorageDomainReport
from volery.contracts.domain import ChainSource, DomainDisk, FileSource
from volery.contracts.errors import Refused, conflict, invalid, not_found
from volery.contracts.volume_orders import MAKE_OVERLAY, MakeOverlay, VolumeInfo

BROKEN = "chain"
"""The rule of refusals for files that aren't above each other as their owner says."""


class _Files(msgspec.Struct):
    """Request to `host_agent.files`: below. Root and name of each."""

    files: list[tuple[str, str]]


class _Names(msgspec.Struct):
    names: list[str | None]


def _levels(source: ChainSource) -> list[FileSource]:
    """From the volume itself to its base."""
    return [source, *(FileSource(path=file.path, format=file.format) for file in source.backing)]


async def check(config: AgentConfig, sources: Sequence[Sequence[FileSource]], hold: Hold = FREE) -> None:
    """Raises Refused unless in each of these chains every file names the next one as the file below it, and the last none."""
    levels = [(places.locate(config, source), below) for chain in sources for source, below in _pairs(chain)]
    if not levels:
        return
    request = _Files([(place.root, place.name) for place, _ in levels])
    found = (await places.ask("below", request, _Names, hold=hold.reading)).names
    for (place, below), name in zip(levels, found, strict=True):
        if name is None:
            raise not_found("volume", place.path)
        if name != below:
            raise conflict(
                f"{place.path} says that {name or 'nothing'} is below it, and it should be {below or 'nothing'}: the files "
                "were changed by hand, or Volery's database is older than they are; nothing was opened. Put the files "
                "right, then refresh the storage domain",
                rule=BROKEN,
                path=place.path,
                below=name,
            )


def _pairs(chain: Sequence[FileSource]) -> Iterable[tuple[FileSource, str]]:
    """Each file with the name of the one below it: all of them lie in one directory."""
    names = [PurePath(source.path).name for source in chain]
    return zip(chain, [*names[1:], ""], strict=True)


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
        below = places.locate(host.config, levels[1])
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
        except BaseException:
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


ACTIONS = (Action(MAKE_OVERLAY, overlay),)
