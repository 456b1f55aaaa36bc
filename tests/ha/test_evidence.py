"""What silence means: tables, and properties over any history of one host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ha.config import HaConfig
from services.ha.policies.evidence import Seen, is_storm, judge
from volery.contracts.liveness import LivenessState

UP, CONNECTING = LivenessState.UP, LivenessState.CONNECTING
NON_RESPONSIVE, UNKNOWN = LivenessState.NON_RESPONSIVE, LivenessState.UNKNOWN
CONFIG = HaConfig()
NOW = 1000.0


@pytest.mark.parametrize(
    ("seen", "listening", "expected"),
    [
        # Beats
        (Seen(UNKNOWN, NOW - 0.4), 0, UP),
        (Seen(CONNECTING, NOW - 0.4), 0, UP),
        (Seen(NON_RESPONSIVE, NOW - 0.4), 0, UP),
        # Silence
        (Seen(UP, NOW - 2.9), 0, UP),
        (Seen(UP, NOW - 3.1), 0, CONNECTING),
        (Seen(CONNECTING, NOW - 9.9), 0, CONNECTING),
        (Seen(UP, NOW - 10.1), 0, NON_RESPONSIVE),
        (Seen(NON_RESPONSIVE, NOW - 100), 0, NON_RESPONSIVE),
        (Seen(UNKNOWN), 0, UNKNOWN),
        # The NATS server said that the agent left
        (Seen(UP, NOW - 1.2, disconnected_at=NOW - 1.1), 0, CONNECTING),
        (Seen(UP, NOW - 0.9, disconnected_at=NOW - 0.8), 0, UP),
        (Seen(UP, NOW - 1.0, disconnected_at=NOW - 1.1), 0, UP),
        (Seen(NON_RESPONSIVE, NOW - 5, disconnected_at=NOW - 4.9), 0, NON_RESPONSIVE),
        # ha has only just begun to listen, or was cut off
        (Seen(UP), NOW + 2, UP),
        (Seen(CONNECTING), NOW - 1, CONNECTING),
        (Seen(UP), NOW - 3.1, CONNECTING),
        (Seen(UP), NOW - 10.1, NON_RESPONSIVE),
        (Seen(UP, NOW - 60), NOW - 1, UP),
        (Seen(UP, NOW - 60, disconnected_at=NOW - 50), NOW - 0.9, UP),
        (Seen(UP, NOW - 60, disconnected_at=NOW - 50), NOW - 1.1, CONNECTING),
        (Seen(NON_RESPONSIVE, NOW - 60), NOW - 1, NON_RESPONSIVE),
        # Another journal beats under its name: not silent, not up
        (Seen(UP, NOW - 20, stranger_beat_at=NOW - 0.4), 0, CONNECTING),
        (Seen(NON_RESPONSIVE, NOW - 20, stranger_beat_at=NOW - 0.4), 0, CONNECTING),
        (Seen(UP, NOW - 20, stranger_beat_at=NOW - 15), 0, NON_RESPONSIVE),
    ],
)
def test_what_is_concluded(seen: Seen, listening: float, expected: LivenessState) -> None:
    assert judge(seen, listening, NOW, CONFIG) is expected


moments = st.none() | st.floats(0, NOW)


@given(st.sampled_from(list(LivenessState)), moments, moments, moments, st.floats(0, NOW + 5))
def test_nobody_is_given_up_without_having_been_listened_to(
    state: LivenessState, beat: float | None, stranger: float | None, left: float | None, since: float
) -> None:
    found = judge(Seen(state, beat, stranger, left), since, NOW, CONFIG)
    listened = NOW - max(beat or 0, since)
    if found is NON_RESPONSIVE and state is not NON_RESPONSIVE:
        assert listened >= CONFIG.silence_seconds
    if found is CONNECTING and state is UP:
        assert listened >= CONFIG.disconnect_seconds
    if found is UP and state is not UP:
        assert beat is not None
        assert NOW - beat < CONFIG.suspect_seconds
    if found is UNKNOWN:
        assert state is UNKNOWN


def test_most_hosts_silent_at_once_is_a_storm() -> None:
    up5 = [UP] * 5
    assert is_storm(up5, [CONNECTING] * 3 + [UP] * 2)
    assert not is_storm(up5, [CONNECTING] * 2 + [UP] * 3)
    assert not is_storm([UP] * 2, [CONNECTING] * 2)
    assert not is_storm([NON_RESPONSIVE] * 5, [NON_RESPONSIVE] * 5)
