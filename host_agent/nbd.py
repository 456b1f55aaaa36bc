"""Reads a block device over NBD: how a volume of any format is sent, while qemu-nbd does the understanding.

The client side of the fixed newstyle handshake and of simple replies, read only
(https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import AsyncIterator

MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
FIXED_NEWSTYLE_NO_ZEROES = 3
OPT_EXPORT_NAME = 1
REQUEST, REPLY = 0x25609513, 0x67446698
READ, DISCONNECT = 0, 2
CHUNK_BYTES = 256 * 1024
PIPELINED = 4


class NbdError(Exception):
    """The server refused a read, or isn't one."""


class Reader:
    """One connection to an export."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size_bytes: int) -> None:
        self._reader = reader
        self._writer = writer
        self.size_bytes = size_bytes
        self._cookie = 0

    async def read(self, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end`; at most 1 MiB is under way. Raises NbdError."""
        offset = start
        waiting: deque[int] = deque()
        lengths: dict[int, int] = {}
        ready: dict[int, bytes] = {}
        while offset < end or waiting:
            while offset < end and len(waiting) < PIPELINED:
                length = min(CHUNK_BYTES, end - offset)
                self._cookie += 1
                self._writer.write(struct.pack(">IHHQQI", REQUEST, 0, READ, self._cookie, offset, length))
                waiting.append(self._cookie)
                lengths[self._cookie] = length
                offset += length
            while waiting[0] not in ready:  # answers come in any order
                cookie, data = await self._answer(lengths)
                ready[cookie] = data
            yield ready.pop(waiting.popleft())

    async def _answer(self, lengths: dict[int, int]) -> tuple[int, bytes]:
        magic, error, cookie = struct.unpack(">IIQ", await self._reader.readexactly(16))
        if magic != REPLY or error or cookie not in lengths:
            raise NbdError(f"reading the volume failed with error {error}")
        return cookie, await self._reader.readexactly(lengths.pop(cookie))


@contextlib.asynccontextmanager
async def connect(path: str) -> AsyncIterator[Reader]:
    """A connection to the default export behind a unix socket. Raises OSError, NbdError, IncompleteReadError."""
    reader, writer = await asyncio.open_unix_connection(path, limit=2 * CHUNK_BYTES)
    try:
        greeting = await reader.readexactly(18)
        if greeting[:16] != MAGIC + OPTION_MAGIC:
            raise NbdError("what listens there doesn't speak NBD")
        writer.write(struct.pack(">I8sII", FIXED_NEWSTYLE_NO_ZEROES, OPTION_MAGIC, OPT_EXPORT_NAME, 0))
        size_bytes, _ = struct.unpack(">QH", await reader.readexactly(10))
        yield Reader(reader, writer, size_bytes)
        writer.write(struct.pack(">IHHQQI", REQUEST, 0, DISCONNECT, 0, 0, 0))
    finally:
        writer.close()
