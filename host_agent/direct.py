"""Direct I/O for programs that read and write whole images: past the host's page cache, as QEMU does with shared disks.

On shared storage another host writes the same file before and after: a page that is kept here may be older than the file,
and one that is written back late would overwrite what is newer. Where a file system can't do it (a staging area in
memory), the page cache is used: only this host reads and writes there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from volery.contracts.errors import Refused

DIRECT, CACHED = "none", "writeback"
CACHES = (DIRECT, CACHED)
"""What is tried, in this order: a file that can't be opened so is refused before anything is read or written."""
NO_DIRECT = "does not support O_DIRECT"
"""What QEMU's programs say then."""


async def converted(convert: Callable[[Sequence[str]], Awaitable[object]]) -> None:
    """`convert` with qemu-img's options for source and target: as much of it direct as can be. Raises what it raises."""
    for target in CACHES:
        for source in CACHES:
            try:
                await convert(("-T", source, "-t", target))
            except Refused as refused:
                if NO_DIRECT not in refused.message or (source, target) == (CACHED, CACHED):
                    raise
            else:
                return


async def tried(work: Callable[[str], Awaitable[object]]) -> None:
    """The same for a program that opens all of its files alike."""
    for cache in CACHES:
        try:
            await work(cache)
        except Refused as refused:
            if NO_DIRECT not in refused.message or cache == CACHED:
                raise
        else:
            return
