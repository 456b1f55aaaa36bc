"""What comes from outside becomes a volume only after it was proven harmless; images from URLs are fetched here."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import msgspec

from host_agent import children, images, iscsi, leased, luns, places, volumes
from host_agent.action import Action, Host, Running
from host_agent.children import ChildFailed, ChildTimedOut
from host_agent.leased import Hold
from host_agent.places import Place
from volery.contracts.domain import FileSource, ImageFormat, VolumeSource
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.volume_orders import IMPORT_VOLUME, ImportVolume, VolumeInfo

FETCH_SECONDS = 24 * 3600.0
FETCH_SHARE = 60.0
"""Of an import's progress; the rest is its conversion."""
HASH_SECONDS = 6 * 3600.0
SHA256_LENGTH = 64


async def adopt(
    host: Host,
    disk_id: str,
    staged: Place,
    target: VolumeSource,
    max_bytes: int,
    running: Running,
    hold: Hold,
) -> VolumeInfo:
    """Makes a staged image the content of a volume, replacing what it held, if the image is harmless and fits.

    The volume keeps its size, or gets the image's. Raises Refused(invalid) with the rule that the image breaks,
    Refused(conflict) while a VM has the volume open.
    """
    file = await places.look(staged, hold)
    if not file.exists:
        raise invalid(f"nothing was received for disk {disk_id}: send the image first")
    head = bytes.fromhex(file.head)
    info = await images.examine(
        staged.path, head, file.size_bytes, max_bytes, timeout_seconds=volumes.CHECK_SECONDS
    )
    size = -(-info.virtual_size // volumes.SECTOR_BYTES) * volumes.SECTOR_BYTES
    if isinstance(target, FileSource):
        place = volumes.own_place(host.config, disk_id, target)
        present = await places.look(place, hold)
        if present.in_use:
            raise conflict(
                f"disk {disk_id} is in use by a running VM: stop it before its content is replaced"
            )
        if present.exists:
            size = max(size, (await volumes.describe(target)).size_bytes)
        if info.format == target.format == ImageFormat.RAW and size == file.size_bytes:
            await places.put(place, staged.name, hold, replace=True)
            return await volumes.describe(target)
    node = images.file_node(staged.path, info.format)
    return await volumes.fill(host.config, disk_id, target, size, node, None, running, hold, replace=True)


async def check_sum(staged: Place, wanted: str, known: str, hold: Hold) -> str:
    """The staged file's SHA-256. Raises Refused(mismatch) when it isn't the one that was announced."""
    found = known or await places.digest(staged, hold, timeout_seconds=HASH_SECONDS)
    if wanted and wanted.lower() != found:
        raise Refused(
            Kind.MISMATCH,
            f"the image's SHA-256 is {found}, not {wanted.lower()}: it was damaged on the way, or is another one",
            sha256=found,
        )
    return found


class _Fetch(msgspec.Struct):
    url: str
    root: str
    name: str
    max_bytes: int
    allowed: tuple[str, ...]
    ca_file: str = ""


class _Fetched(msgspec.Struct):
    size_bytes: int
    sha256: str


async def import_volume(host: Host, order: ImportVolume, running: Running) -> VolumeInfo:
    """Downloads an image and makes it the content of the volume.

    Raises Refused: the address can't or mustn't be read, too large, wrong checksum, a hostile image.
    """
    if order.sha256 and (
        len(order.sha256) != SHA256_LENGTH or not set(order.sha256.lower()) <= set("0123456789abcdef")
    ):
        raise invalid(f"{order.sha256[:80]!r} isn't a SHA-256: write its 64 hexadecimal digits")
    async with luns.writing(host, order.disk_id, order.target, order.lease) as hold:
        root = places.home(host.config, order.target)
        if isinstance(order.target, FileSource):
            volumes.own_place(host.config, order.disk_id, order.target)
        else:
            await iscsi.size(order.target)
        staged = Place(root, "staging", f"{order.disk_id}.import")
        limit = order.max_bytes or images.MAX_VIRTUAL_BYTES
        try:
            fetched = await _fetch(host, order.url, staged, limit, running, hold)
            sha256 = await check_sum(staged, order.sha256, fetched.sha256, hold)
            converting = replace(running, progress=_rest_of(running))
            info = await adopt(host, order.disk_id, staged, order.target, limit, converting, hold)
        finally:
            await places.abandon(staged, hold)
        return msgspec.structs.replace(info, sha256=sha256)


def _rest_of(running: Running) -> Any:
    def progress(percent: float, details: dict[str, Any]) -> None:
        running.progress(FETCH_SHARE + percent * (100 - FETCH_SHARE) / 100, details)

    return progress


class _Progress(msgspec.Struct):
    progress: float | None = None


async def _fetch(
    host: Host, url: str, staged: Place, max_bytes: int, running: Running, hold: Hold
) -> _Fetched:
    allowed = tuple(n.strip() for n in host.config.import_networks.split(",") if n.strip())
    request = _Fetch(url, staged.root, staged.name, max_bytes, allowed, os.environ.get("SSL_CERT_FILE", ""))
    lines = children.LineReader()

    def hear(piece: bytes) -> None:
        for line in lines.feed(piece):
            told = msgspec.json.decode(line, type=_Progress).progress
            if told is not None:
                running.progress(told * FETCH_SHARE / 100, {"step": "download"})

    try:
        await leased.run_holding(
            hold,
            children.python_arguments("host_agent.fetch", "get"),
            timeout_seconds=FETCH_SECONDS,
            stdin=msgspec.json.encode(request),
            environment=children.PYTHON_ENVIRONMENT,
            on_output=hear,
        )
    except ChildTimedOut as failure:
        raise Refused(Kind.TIMEOUT, f"the download took more than {FETCH_SECONDS:g} s") from failure
    except ChildFailed as failure:
        raise Refused(Kind.UNAVAILABLE, f"the download failed: {failure.reason}") from failure
    return children.decode_answer(lines.last, _Fetched)


ACTIONS = (Action(IMPORT_VOLUME, import_volume),)
