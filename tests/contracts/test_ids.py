"""Ids come from a source that a simulation may replace."""

from __future__ import annotations

import uuid

from volery.contracts.ids import SOURCE, Source, is_id, new_id, random_id, random_token


def counting() -> Source:
    state = [0]

    def random_bytes(size: int) -> bytes:
        state[0] += 1
        return state[0].to_bytes(size, "big")

    return Source(lambda: 1_700_000_000_000, random_bytes)


def test_a_source_that_repeats_itself_gives_the_same_ids() -> None:
    made = []
    for _ in range(2):
        before = SOURCE.set(counting())
        made.append((new_id(), new_id(), random_id(), random_token(6)))
        SOURCE.reset(before)
    assert made[0] == made[1]
    first, second, order, _ = made[0]
    assert first != second
    assert uuid.UUID(first).version == 7
    assert uuid.UUID(order).version == 4
    assert is_id(first)
    assert is_id(order)


def test_real_ids_differ() -> None:
    assert new_id() != new_id()
    assert random_id() != random_id()
