"""A ledger is torn when, and only when, two boots wrote over each other or a write was lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trials import ledger
from trials.ledger import SECTOR, Boot, Torn


def record(number: int, boot: str) -> bytes:
    return f"{number} {boot} 12.5".ljust(SECTOR - 1).encode() + b"\n"


def written(*boots: str) -> bytearray:
    """One record after the other by these boots."""
    content = bytearray(ledger.blank())
    for number, boot in enumerate(boots, 1):
        content[number * SECTOR : (number + 1) * SECTOR] = record(number, boot)
    return content


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=4))
def test_boots_that_followed_each_other_are_told_apart(lengths: list[int]) -> None:
    names = [f"boot-{number}" for number, length in enumerate(lengths) for _ in range(length)]
    found = ledger.read(bytes(written(*names)))
    assert [(boot.last - boot.first + 1) for boot in found] == lengths
    assert [boot.id for boot in found] == list(dict.fromkeys(names))


def test_a_former_boot_that_wrote_again_tears_it() -> None:
    with pytest.raises(Torn, match="boot a wrote sector 4 after b had begun"):
        ledger.read(bytes(written("a", "a", "b", "a", "b")))


def test_a_lost_write_tears_it() -> None:
    content = written("a", "a", "a")
    content[2 * SECTOR : 3 * SECTOR] = bytes(SECTOR)
    with pytest.raises(Torn, match="sector 2 is empty, but sector 3 is written"):
        ledger.read(bytes(content))


def test_a_record_of_another_count_or_half_a_record_tears_it() -> None:
    content = written("a", "a")
    content[2 * SECTOR : 3 * SECTOR] = record(7, "a")
    with pytest.raises(Torn, match="sector 2 says that it is 7"):
        ledger.read(bytes(content))
    content[2 * SECTOR : 3 * SECTOR] = record(2, "a")[:200].ljust(SECTOR, b"\0")
    with pytest.raises(Torn, match="is no record"):
        ledger.read(bytes(content))
    with pytest.raises(Torn, match="header"):
        ledger.read(bytes(SECTOR * 4))


def test_one_boot() -> None:
    assert ledger.read(bytes(written("a", "a"))) == [Boot("a", 1, 2)]
    assert ledger.read(ledger.blank()) == []
