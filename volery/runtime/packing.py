"""Large answers travel compressed: a list of VMs shrinks to a tenth, in less time than the bus takes to carry the rest.

What is small goes as it is. The receiver knows by the header, so either side may begin to pack before the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import zstandard

ENCODING_HEADER = "Content-Encoding"
ENCODING = "zstd"
WORTH_BYTES = 64_000
"""Below it, compressing costs more than carrying."""
LEVEL = -5
"""1.2 MB of VMs: 0.6 ms to 73 kB; level 1 takes 1.0 ms to 40 kB."""
MAX_UNPACKED_BYTES = 64 * 1024 * 1024

_compressor = zstandard.ZstdCompressor(level=LEVEL)
_decompressor = zstandard.ZstdDecompressor()


class Packed(bytes):
    """Bytes that are compressed."""


def pack(body: bytes) -> bytes:
    """Compressed where that is worth it."""
    return body if len(body) < WORTH_BYTES or isinstance(body, Packed) else Packed(_compressor.compress(body))


def unpack(body: bytes, headers: Mapping[str, str] | None) -> bytes:
    """What was packed, by the headers that came with it. Raises ValueError for what is damaged or too large."""
    if not headers or headers.get(ENCODING_HEADER) != ENCODING:
        return body
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= MAX_UNPACKED_BYTES:
            raise ValueError(f"a packed answer of {size} bytes is not accepted")
        return _decompressor.decompress(body)
    except zstandard.ZstdError as error:
        raise ValueError(f"a packed answer is damaged: {error}") from error
