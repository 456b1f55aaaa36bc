"""Which LUNs are open on this host, and how one becomes a disk's: proven blank, and blank again in the end.

A LUN has no name of its own and no lock. What says that it isn't free is whoever has it open, and what is on it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable

from host_agent import children, images, iscsi, leases, places
from host_agent.action import Action, Host, Running
from host_agent.children import ChildFailed
from host_agent.config import AgentConfig
from host_agent.leased import Hold
from volery.contracts.agent import LunClaim, OpenLun
from volery.contracts.domain import DomainLease, ImageFormat, IscsiSource, VolumeSource
from volery.contracts.errors import conflict, invalid
from volery.contracts.volume_orders import CLAIM_LUN, ClaimLun, VolumeInfo

WHOLE_SECONDS = 24 * 3600.0
"""For reading or writing a whole LUN of a target that can't tell or unmap its blocks."""
HYPERVISOR_SECONDS = 10.0
DIFFERS = 1
"""qemu-img compare's status for other content."""
OFFSET = re.compile(rb"Content mismatch at offset (\d+)")
SAID_BYTES = 4096


async def open_now(host: Host) -> tuple[OpenLun, ...]:
    """LUNs that a domain of this host has open, whoever made it, or that an order's work is writing.

    Raises Refused while libvirt can't be asked.
    """
    await host.hypervisor.wait_connected(HYPERVISOR_SECONDS)
    return (*await host.hypervisor.open_luns(), *places.luns_at_work(host.config))


@contextlib.asynccontextmanager
async def writing(
    host: Host, disk_id: str, target: VolumeSource, lease: DomainLease | None = None
) -> AsyncIterator[Hold]:
    """What a volume is written under, also when it is a LUN; one that a VM has open is refused."""
    async with places.volume_lock(host.config, disk_id, target, lease) as hold:
        if isinstance(target, IscsiSource):
            await _refuse_open(host, target, disk_id)
        if lease is not None:
            await leases.ensure(host, lease)
        yield hold


async def _refuse_open(host: Host, lun: IscsiSource, disk_id: str) -> None:
    for one in await open_now(host):
        if (one.iqn, one.lun) != (lun.iqn, lun.lun) or (not one.vm_id and one.disk_id == disk_id):
            continue
        by = f"VM {one.vm_id}" if one.vm_id else f"an order for disk {one.disk_id}"
        raise conflict(
            f"LUN {lun.lun} of {lun.iqn} is open on this host by {by}: nothing was written; stop that first",
            rule="lun_open",
            vm_id=one.vm_id,
            disk_id=one.disk_id,
        )


async def existing(config: AgentConfig, lun: IscsiSource, size_bytes: int) -> VolumeInfo:
    """The LUN, if it is on a connected target and large enough. Raises Refused."""
    places.check_lun(config, lun)
    size = await iscsi.size(lun)
    if size < size_bytes:
        raise invalid(
            f"LUN {lun.lun} of {lun.iqn} has {size} bytes, fewer than the {size_bytes} asked for: "
            "make the LUN larger on the target, or ask for a smaller disk",
            size_bytes=size,
        )
    return VolumeInfo(size_bytes=size, used_bytes=size, format=ImageFormat.RAW)


async def claim(host: Host, order: ClaimLun, running: Running) -> VolumeInfo:
    """Proves that nothing is lost when the LUN becomes this disk's, and that its reader sees nobody's former data."""
    async with writing(host, order.disk_id, order.source) as hold:
        _refuse_former(host, order)
        found = await existing(host.config, order.source, order.size_bytes)
        if order.overwrite:
            await zero(order.source, 0, found.size_bytes, hold, _teller(running))
        else:
            await _refuse_content(order.source, found.size_bytes, hold, _teller(running))
        places.note_claim(host.config, _claim_of(order))
        return found


def _claim_of(order: ClaimLun) -> LunClaim:
    return LunClaim(iqn=order.source.iqn, lun=order.source.lun, claim=order.claim, disk_id=order.disk_id)


def _refuse_former(host: Host, order: ClaimLun) -> None:
    mine = _claim_of(order)
    for known in places.claims(host.config):
        same = (known.iqn, known.lun) == (mine.iqn, mine.lun)
        if same and known.claim >= mine.claim and known != mine:
            raise conflict(
                f"LUN {known.lun} of {known.iqn} was given to disk {known.disk_id} under claim {known.claim}, and this "
                f"is claim {mine.claim}: the order comes from an older database",
                rule="lun_claimed",
                claim=known.claim,
                disk_id=known.disk_id,
            )


async def claims(host: Host) -> tuple[LunClaim, ...]:
    """The newest claim of each LUN that this host carried out; they outlive the disks."""
    return places.claims(host.config)


async def blank(host: Host, lun: IscsiSource, *, wipe: bool, running: Running, hold: Hold) -> None:
    """Zeros over the whole LUN, so that it may be another disk's."""
    places.check_lun(host.config, lun)
    await zero(lun, 0, await iscsi.size(lun), hold, _teller(running), written=wipe)


def _teller(running: Running) -> Callable[[float], None]:
    return lambda percent: running.progress(percent, {})


async def _refuse_content(
    lun: IscsiSource, size_bytes: int, hold: Hold, tell: Callable[[float], None]
) -> None:
    """Raises Refused(conflict) with the first place that isn't zero. What the target says is unmapped isn't read."""
    said = bytearray()
    progress = images.progress_reader(tell)

    def hear(piece: bytes) -> None:
        said.extend(piece)
        del said[:-SAID_BYTES]
        progress(piece)

    try:
        with images.secrets(lun) as (arguments, descriptors):
            await children.run(
                [
                    *("qemu-img", "compare", "-p", *arguments),
                    *(images.address(_zeros(size_bytes)), images.address(images.source_node(lun))),
                ],
                timeout_seconds=WHOLE_SECONDS,
                limits=images.CONVERT_LIMITS,
                pass_fds=(*descriptors, *hold.pass_fds),
                on_output=hear,
            )
    except ChildFailed as failure:
        found = OFFSET.search(said)
        if failure.status != DIFFERS or found is None:
            raise images.explained(failure, "compare") from failure
        raise conflict(
            f"LUN {lun.lun} of {lun.iqn} isn't blank: there is something at byte {int(found[1])} that no disk explains",
            rule="lun_content",
            offset=int(found[1]),
        ) from failure


async def zero(
    lun: IscsiSource,
    start: int,
    end: int,
    hold: Hold,
    tell: Callable[[float], None],
    *,
    written: bool = False,
) -> None:
    """Zeros over a part of a LUN: unmapped where the target then reads zeros, unless they are to be `written`."""
    target = images.source_node(lun)
    part = {"driver": "raw", "offset": start, "size": end - start, "file": target["file"]}
    with images.secrets(lun) as (arguments, descriptors):
        await images.qemu_img(
            "convert",
            [
                *("-n", "-p", "-t", "writeback", *(("-S", "0") if written else ())),
                *(*arguments, images.address(_zeros(end - start)), images.address(part)),
            ],
            timeout_seconds=WHOLE_SECONDS,
            limits=images.CONVERT_LIMITS,
            pass_fds=descriptors,
            hold=hold,
            on_progress=tell,
        )


def _zeros(size_bytes: int) -> images.Node:
    return {"driver": "null-co", "size": size_bytes, "read-zeroes": True}


ACTIONS = (Action(CLAIM_LUN, claim),)
