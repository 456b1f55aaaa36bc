"""Settings of ha: VOLERY_HA_*."""

from __future__ import annotations

import msgspec


class HaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_HA_. Hosts beat every 0.5 s."""

    suspect_seconds: float = 3.0
    """Without a beat for this long a host is suspected (connecting): six beats, and more than the 2.5 s in which
    the NATS server notices a cut connection."""
    disconnect_seconds: float = 1.0
    """Suspected as soon as this after the NATS server said that its agent left, unless it came back: reconnecting
    takes an agent less."""
    silence_seconds: float = 10.0
    """Without a beat for this long a host is non-responsive. It is evidence, not proof: nothing is fenced or
    restarted for it."""
    settle_seconds: float = 2.0
    """After ha started or was cut off from the bus, silence counts from this much later: agents reconnect with
    a random wait of up to two seconds."""
    storm_hold_seconds: float = 10.0
    """When most hosts fall silent at once, ha waits this long before it believes it: more likely the bus or ha
    itself is in trouble than every host."""
    restart_first_delay_seconds: float = 10.0
    """The first restart is at once; the second waits this long, each further one twice as long as the last."""
    restart_longest_delay_seconds: float = 300.0
    restarts_at_most: int = 10
    """After so many restarts within `restart_window_seconds` ha gives up, and says so."""
    restart_window_seconds: float = 3600.0
