"""Files that are received: long runs of zeros in them become holes.

For programs beside `host_agent.files`, so the standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

HOLE_BYTES = 64 * 1024
ZEROS = bytes(HOLE_BYTES)


def fill(read_into: Callable[[memoryview], int | None], view: memoryview) -> int:
    """Reads until the buffer is full or the source has ended; pieces that are large enough keep their holes."""
    filled = 0
    while filled < len(view) and (count := read_into(view[filled:])):
        filled += count
    return filled


class SparseFile:
    """A file written from `position` on: long runs of zeros become holes, its size is always what was received."""

    def __init__(self, descriptor: int, position: int) -> None:
        self.descriptor = descriptor
        self.position = position
        self.synced = position

    def write(self, data: memoryview) -> None:
        """Raises OSError(ENOSPC, EDQUOT, EIO, …); what was written before stays and counts."""
        start = 0
        while start < len(data):
            end, zero = self._run(data, start)
            if zero:
                self.hole(end - start)
            while not zero and start < end:
                written = os.pwrite(self.descriptor, data[start:end], self.position)
                self.position += written
                start += written
            start = end

    def _run(self, data: memoryview, start: int) -> tuple[int, bool]:
        """Where the run of equal kind (whole zero blocks of the file, or anything else) that begins here ends."""
        end, zero = start, None
        while end < len(data):
            stop = end + HOLE_BYTES - (self.position + end - start) % HOLE_BYTES
            piece = data[end:stop]
            is_zero = len(piece) == HOLE_BYTES and not piece[0] and bytes(piece) == ZEROS
            if zero is not None and is_zero is not zero:
                break
            zero, end = is_zero, end + len(piece)
        return end, bool(zero)

    def hole(self, length: int) -> None:
        end = self.position + length
        if os.fstat(self.descriptor).st_size > self.position:
            os.ftruncate(self.descriptor, self.position)
        os.ftruncate(self.descriptor, end)
        self.position = end

    def sync(self) -> None:
        os.fsync(self.descriptor)
        self.synced = self.position
