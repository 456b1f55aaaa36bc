"""Large answers are packed on the bus, and what can't be packed well is cut into more pages, never refused."""

from __future__ import annotations

import random
import string

import msgspec
import pytest
import zstandard

from tests.runtime.toy import CREATE_TOY, LIST_TOYS, CreateToy, toy_service
from tests.support.runtime import running
from volery.contracts.operation import ListQuery, Page
from volery.runtime import packing
from volery.runtime.packing import ENCODING, ENCODING_HEADER, MAX_UNPACKED_BYTES, Packed, pack, unpack
from volery.runtime.programs import Settings

HEADERS = {ENCODING_HEADER: ENCODING}


def test_what_is_small_goes_as_it_is() -> None:
    small = b"x" * (packing.WORTH_BYTES - 1)
    assert pack(small) is small
    assert unpack(small, None) is small
    assert unpack(small, {"traceparent": "00"}) is small


def test_what_is_large_comes_back_whole() -> None:
    large = b'{"id":"01a1f94f","status":"down"},' * 10_000
    packed = pack(large)
    assert isinstance(packed, Packed)
    assert len(packed) < len(large) / 5
    assert pack(packed) is packed
    assert unpack(packed, HEADERS) == large


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"not packed",
        pack(b"x" * 100_000)[:-3],
        zstandard.ZstdCompressor().compress(bytes(MAX_UNPACKED_BYTES + 1)),
    ],
    ids=["nothing", "something else", "cut off", "a bomb"],
)
def test_what_is_damaged_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="packed answer"):
        unpack(bytes(damaged), HEADERS)


@pytest.mark.parametrize("noise", [False, True])
async def test_a_page_that_is_larger_than_a_message(configured: Settings, noise: bool) -> None:
    """3 MB of documents: in one page where they can be packed, in several where they can't."""
    letters = random.Random(7)
    note = 50_000 * "long "
    async with running(configured, toy_service()) as bus:
        for number in range(10):
            if noise:
                note = "".join(letters.choices(string.ascii_letters + string.digits, k=250_000))
            await bus.ask(CREATE_TOY, CreateToy(name=str(number), note=note))
        pages, names, after = 0, [], ""
        while after or not pages:
            page: Page = await bus.ask(LIST_TOYS, ListQuery(page=after))
            names += [msgspec.json.decode(item)["name"] for item in page.items]
            pages, after = pages + 1, page.next
        assert names == [str(number) for number in range(10)]
        assert pages == (4 if noise else 1)
