"""Uploads and downloads of images: what a ticket of the data server stands for, from OPEN_TRANSFER to FINISH_TRANSFER.

An upload lands in a staging file that outlives the agent; a download reads the volume through a qemu-nbd of its
own, whose image lock keeps a running VM's disk from being sent half written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from host_agent import children, direct, images, intake, listening, luns, nbd, places, volumes
from host_agent.action import Action, Host, Running
from host_agent.children import ChildFailed
from host_agent.config import AgentConfig
from host_agent.places import Place
from volery.contracts.base import Done
from volery.contracts.domain import ChainSource, FileSource, ImageFormat, VolumeSource
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found
from volery.contracts.ids import is_id
from volery.contracts.volume_orders import (
    FINISH_TRANSFER,
    OPEN_TRANSFER,
    FinishTransfer,
    OpenTransfer,
    TransferDirection,
    TransferOpened,
    VolumeInfo,
)

log = logging.getLogger(__name__)

SYNC_SECONDS = 120.0
"""What the storage may take to make an upload durable when its request ends."""
START_SECONDS = 20.0
POLL_SECONDS = 0.01
MIN_TICKET = 16
PIPE_BYTES = 1024 * 1024
"""Of an upload on its way to its receiver."""


class Received(msgspec.Struct):
    """What is here of an upload. `sha256` only when all of it came in one request."""

    exists: bool = True
    size_bytes: int = 0
    received_bytes: int = 0
    sha256: str = ""


class _Staging(msgspec.Struct):
    root: str
    name: str
    boot_id: str
    size_bytes: int = 0
    offset: int = 0


@dataclass(slots=True)
class Upload:
    """One upload. A new request takes over from one that may have lost its client."""

    transfer_id: str
    disk_id: str
    place: Place
    size_bytes: int
    boot_id: str
    lock_path: Path
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _requests: int = 0
    _feeding: asyncio.Task[Refused | None] | None = None

    def _request(self, offset: int = 0) -> _Staging:
        return _Staging(self.place.root, self.place.name, self.boot_id, self.size_bytes, offset)

    async def look(self) -> Received:
        return await _ask("look", self._request())

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[int]:
        """Ends the request that writes now, and has the file for oneself until somebody else wants it."""
        self._requests += 1
        mine = self._requests
        if self._feeding is not None:
            self._feeding.cancel()
        async with self._turn:
            yield mine

    async def receive(self, offset: int, body: AsyncIterator[bytes]) -> Received:
        """Writes a request's body from `offset` on. What came stays, also if this raises.

        Raises Refused: another request took over, beyond the announced size, the storage is full or hangs.
        """
        async with self._alone() as mine, self._held() as lock:
            arguments = children.python_arguments("host_agent.receive", "write")
            environment = children.PYTHON_ENVIRONMENT
            async with (
                children.child(arguments, stdin=PIPE, environment=environment, pass_fds=(lock,)) as process,
                children.works(children.last_words(process)) as (said,),
            ):
                self._feeding = asyncio.create_task(self._feed(process, offset, body))
                if mine != self._requests:  # somebody came while the receiver started
                    self._feeding.cancel()
                try:
                    problem = await self._fed(self._feeding, mine)
                finally:
                    self._feeding = None
                    answer = await self._ended(process)
                if not answer:
                    raise Refused(Kind.UNAVAILABLE, f"writing the upload failed: {await said}")
            done = children.decode_answer(answer, Received)
            if problem is not None:
                raise problem
            return done

    async def _fed(self, feeding: asyncio.Task[Refused | None], mine: int) -> Refused | None:
        try:
            return await feeding
        except asyncio.CancelledError:
            if mine == self._requests:  # the request itself was cancelled
                feeding.cancel()
                raise
            return conflict(f"upload {self.transfer_id} goes on in another request")

    async def _ended(self, process: asyncio.subprocess.Process) -> bytes:
        """The receiver's last line, once it has made durable what it has."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(SYNC_SECONDS):
                return (await process.stdout.read()).rstrip().rsplit(b"\n", 1)[-1]
        except TimeoutError as error:
            raise Refused(
                Kind.TIMEOUT, f"the storage of upload {self.transfer_id} hangs: try again later"
            ) from error

    async def _feed(
        self,
        process: asyncio.subprocess.Process,
        offset: int,
        body: AsyncIterator[bytes],
    ) -> Refused | None:
        """Passes the body on; returns why it stopped early, if it did."""
        pipe = process.stdin
        assert pipe is not None
        pipe.transport.set_write_buffer_limits(high=PIPE_BYTES)
        pipe.write(msgspec.json.encode(self._request(offset)) + b"\n")
        left = self.size_bytes - offset
        try:
            async for piece in body:
                left -= len(piece)
                if left < 0:
                    return Refused(
                        Kind.TOO_LARGE,
                        f"upload {self.transfer_id} has more than the {self.size_bytes} bytes that were announced",
                        size_bytes=self.size_bytes,
                    )
                pipe.write(piece)
                await pipe.drain()
        except (BrokenPipeError, ConnectionResetError, RuntimeError):  # uvloop's word for a closed pipe
            return None  # the receiver ended early; its answer says why
        return None

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[int]:
        async with children.held(
            self.lock_path,
            wait_seconds=SYNC_SECONDS,
            otherwise=f"upload {self.transfer_id} is still being written by a former run of the agent",
        ) as lock:
            yield lock

    async def stop(self) -> None:
        """Returns once nobody writes the staging file any more."""
        async with self._alone(), self._held():
            pass


@dataclass(slots=True)
class Download:
    """One download: a read-only qemu-nbd that lives as long as its ticket."""

    transfer_id: str
    node: images.Node
    source: VolumeSource
    expires_seconds: float
    directory: Path
    temporary: Place | None = None
    size_bytes: int = 0
    _serving: asyncio.Task[None] | None = None
    _descriptor: int = -1

    async def start(self) -> None:
        """Raises Refused: the volume is in use by a running VM, or can't be read."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700, parents=True)
        self._descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._serve(failed))
        try:
            async with asyncio.timeout(START_SECONDS):
                self.size_bytes = await self._wait(failed)
        except TimeoutError as error:
            await self.stop()
            raise Refused(
                Kind.TIMEOUT, f"volume of transfer {self.transfer_id} can't be opened: its storage hangs"
            ) from error
        except BaseException:
            await self.stop()
            raise

    @property
    def _socket(self) -> str:
        """By way of the directory's descriptor: a unix socket's path may have 107 bytes only."""
        return f"/proc/self/fd/{self._descriptor}/nbd"

    async def _run(self, program: Sequence[str]) -> tuple[str, int]:
        """The program to its end: what it said last, and its status."""
        with images.secrets(self.source) as (arguments, descriptors):
            async with children.child(
                [*program, *arguments, images.address(self.node)],
                limits=images.CONVERT_LIMITS,
                pass_fds=(*descriptors, self._descriptor),
            ) as process:
                return await children.last_words(process), await process.wait()

    async def _serve(self, failed: asyncio.Future[None]) -> None:
        """Until it is stopped or its ticket has expired; then nothing of it is left."""
        program = ["qemu-nbd", "--read-only", "--persistent", "--shared=0", "--socket", self._socket]
        try:
            async with asyncio.timeout(self.expires_seconds):
                for cache in direct.CACHES:
                    said, status = await self._run([*program, f"--cache={cache}"])
                    if direct.NO_DIRECT not in said:
                        break
            if not failed.done():
                failed.set_exception(images.explained(ChildFailed("qemu-nbd", status, said), "nbd"))
        except TimeoutError:
            log.info("the ticket of download %s has expired", self.transfer_id)
        finally:
            await self._clean()

    async def _clean(self) -> None:
        os.close(self._descriptor)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.temporary is not None:
            await places.remove(self.temporary)

    async def _wait(self, failed: asyncio.Future[None]) -> int:
        while True:
            if failed.done():
                failed.result()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with nbd.connect(self._socket) as reader:
                    failed.cancel()
                    return reader.size_bytes
            await asyncio.sleep(POLL_SECONDS)

    def connect(self) -> contextlib.AbstractAsyncContextManager[nbd.Reader]:
        return nbd.connect(self._socket)

    async def stop(self) -> None:
        """Ends qemu-nbd and removes what was made for the download."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})


async def _ask(verb: str, request: _Staging) -> Received:
    try:
        return await children.python(
            "host_agent.receive", verb, request, Received, timeout_seconds=places.FILE_SECONDS
        )
    except ChildFailed as failure:
        raise Refused(Kind.UNAVAILABLE, f"the upload's storage doesn't answer: {failure.reason}") from failure


def _boot_id(config: AgentConfig) -> str:
    return Path(config.boot_id_path).read_text().strip()


def _staged(config: AgentConfig, transfer_id: str, target: VolumeSource) -> Place:
    root = places.home(config, target)
    return Place(root, "staging", f"{transfer_id}.upload")


async def open_transfer(host: Host, order: OpenTransfer, running: Running) -> TransferOpened:
    """Admits the ticket. A repeat, also after a restart of the agent, goes on where the upload was.

    Raises Refused: the volume is absent or in use (download), odd ids, a size that can't be.
    """
    if not is_id(order.transfer_id) or not is_id(order.disk_id):
        raise invalid("a transfer's and a disk's ids must be UUIDs")
    if len(order.ticket) < MIN_TICKET or not order.ticket.replace("-", "").replace("_", "").isalnum():
        raise invalid(f"a transfer's ticket must have {MIN_TICKET} or more letters, digits, - and _")
    await _close(host, order.transfer_id)
    opening = _open_upload if order.direction is TransferDirection.UPLOAD else _open_download
    return await opening(host, order)


async def _open_upload(host: Host, order: OpenTransfer) -> TransferOpened:
    if not 0 < order.size_bytes <= images.MAX_VIRTUAL_BYTES:
        raise invalid(f"an upload of {order.size_bytes} bytes isn't possible: announce the file's size")
    upload = Upload(
        order.transfer_id,
        order.disk_id,
        _staged(host.config, order.transfer_id, order.source),
        order.size_bytes,
        _boot_id(host.config),
        Path(host.config.state_dir) / "locks" / f"transfer-{order.transfer_id}",
    )
    begun = await _ask("begin", upload._request())
    host.tickets.admit(order.ticket, "upload", upload, order.expires_seconds)
    return TransferOpened(
        data_address=listening.address(host.config),
        size_bytes=order.size_bytes,
        received_bytes=begun.received_bytes,
    )


async def _open_download(host: Host, order: OpenTransfer) -> TransferOpened:
    source = order.source
    node, temporary = images.source_node(source), None
    if isinstance(source, FileSource):
        place = places.locate(host.config, source)
        if not (await places.look(place)).exists:
            raise not_found("volume", place.path)
        if order.format is ImageFormat.QCOW2 and _is_whole(source):  # as it is, byte by byte
            node = images.file_node(place.path, "raw")
    else:
        places.check_lun(host.config, source)
    if order.format is ImageFormat.QCOW2 and not _is_whole(source):
        temporary = await _converted(host, order, node)
        node = images.file_node(temporary.path, "raw")
    directory = Path(host.config.state_dir) / "nbd" / order.transfer_id
    download = Download(order.transfer_id, node, source, order.expires_seconds, directory, temporary)
    await download.start()
    host.tickets.admit(order.ticket, "download", download, order.expires_seconds)
    return TransferOpened(data_address=listening.address(host.config), size_bytes=download.size_bytes)


def _is_whole(source: VolumeSource) -> bool:
    """Whether the volume is one qcow2 file with everything in it."""
    if not isinstance(source, FileSource) or isinstance(source, ChainSource):
        return False
    return source.format is ImageFormat.QCOW2


async def _converted(host: Host, order: OpenTransfer, node: images.Node) -> Place:
    """A qcow2 copy of a raw volume, or of one with others below it: its size must be known before the first byte is sent."""
    place = Place(places.home(host.config, order.source), "staging", f"{order.transfer_id}.download")
    await places.remove(place)

    async def convert(caches: Sequence[str]) -> None:
        with images.secrets(order.source) as (arguments, descriptors):
            await images.qemu_img(
                "convert",
                [*caches, "-O", "qcow2", *arguments, images.address(node), place.path],
                timeout_seconds=volumes.CONVERT_SECONDS,
                limits=images.CONVERT_LIMITS,
                pass_fds=descriptors,
            )

    try:
        await direct.converted(convert)
    except BaseException:
        await places.remove(place)
        raise
    return place


async def _close(host: Host, transfer_id: str) -> list[Upload | Download]:
    """Revokes the transfer's tickets and ends what runs for them."""
    revoked = host.tickets.revoke_where(lambda t: getattr(t.target, "transfer_id", "") == transfer_id)
    targets: list[Upload | Download] = [ticket.target for ticket in revoked]
    for target in targets:
        await target.stop()
    return targets


async def finish_transfer(host: Host, order: FinishTransfer, running: Running) -> VolumeInfo:
    """An upload becomes the volume's content if it is whole, unharmed and harmless; a download's helpers end.

    An upload that isn't whole keeps its ticket, so that it can go on. Raises Refused: incomplete (conflict), wrong
    checksum (mismatch), hostile (invalid); after the last two nothing of it is left.
    """
    if not is_id(order.transfer_id):
        raise invalid(f"{order.transfer_id!r} isn't the id of a transfer")
    staged = _staged(host.config, order.transfer_id, order.target)
    staging = _Staging(staged.root, staged.name, _boot_id(host.config))
    if order.cancel:
        await _close(host, order.transfer_id)
        await _discard(staging)
        return VolumeInfo(size_bytes=0, used_bytes=0, format=ImageFormat.RAW)
    found = await _ask("look", staging)
    if not found.exists:  # a download, or a repeat of a FINISH that was done
        await _close(host, order.transfer_id)
        info = await volumes.describe(order.target)
        return msgspec.structs.replace(info, sha256=order.sha256)
    if found.received_bytes < found.size_bytes:
        raise conflict(
            f"upload {order.transfer_id} has {found.received_bytes} of {found.size_bytes} bytes: send the rest first",
            received_bytes=found.received_bytes,
            size_bytes=found.size_bytes,
        )
    await _close(host, order.transfer_id)
    return await _adopted(host, order, staged, running)


async def _adopted(host: Host, order: FinishTransfer, staged: Place, running: Running) -> VolumeInfo:
    staging = _Staging(staged.root, staged.name, _boot_id(host.config))
    async with luns.writing(host, order.disk_id, order.target, order.lease) as hold:
        try:
            found = await _ask("look", staging)
            sha256 = await intake.check_sum(staged, order.sha256, found.sha256, hold)
            info = await intake.adopt(
                host, order.disk_id, staged, order.target, order.max_bytes, running, hold
            )
        except Refused as refused:
            if refused.kind in (Kind.INVALID, Kind.MISMATCH):
                await _discard(staging)
            raise
        await _discard(staging)
        return msgspec.structs.replace(info, sha256=sha256)


async def _discard(staging: _Staging) -> None:
    try:
        await children.python(
            "host_agent.receive", "discard", staging, Done, timeout_seconds=places.FILE_SECONDS
        )
    except ChildFailed as failure:
        raise Refused(Kind.UNAVAILABLE, f"the upload can't be removed: {failure.reason}") from failure


ACTIONS = (Action(OPEN_TRANSFER, open_transfer), Action(FINISH_TRANSFER, finish_transfer))
