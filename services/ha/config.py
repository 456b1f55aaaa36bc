"""Settings of ha: VOLERY_HA_*."""

from __future__ import annotations

import msgspec

LEAST_SILENCE_SECONDS = 35.0


class HaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_HA_. Hosts beat every 0.5 s."""

    suspect_seconds: float = 3.0
    """Without a beat for this long a host is suspected (connecting): six beats, and more than the 2.5 s in which
    the NATS server notices a cut connection."""
    disconnect_seconds: float = 1.0
    """Suspected as soon as this after the NATS server said that its agent left, unless it came back: reconnecting
    takes an agent less."""
    silence_seconds: float = 10.0
    """Without a beat for this long a host is non-responsive. It is evidence, not proof: nothing is restarted for it."""
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
    blackout_seconds: float = 900.0
    """So long after ha began, hosts that it has not heard yet may still come back from a blackout: a start that failed is no
    attempt, and VMs wait for more important ones."""
    blackout_wait_seconds: float = 60.0
    """But not longer than this: the host on which the more important VM ran may never come back."""
    priority_wait_seconds: float = 600.0
    """So long at most does a VM that ended wait until more important ones of its cluster have a host."""
    silence_before_fence_seconds: float = 60.0
    """A silent host whose BMC says that it is on is left alone for this long. Never below 35 s, in which a host that
    was only cut off for a moment, or swaps, is back."""
    start_hold_seconds: float = 300.0
    """After ha started, or its leader changed, no host is ordered off for this long: what is silent after a blackout is
    most often still starting. A BMC that says off counts at once."""
    off_retry_seconds: float = 20.0
    """A host that is still on this long after it was ordered off is ordered off again."""
    off_attempts: int = 3
    """After so many orders that did nothing a person is asked."""
    on_wait_seconds: float = 60.0
    """A fenced host is switched on again when inventory has dealt with its VMs, at the latest after this; for as long it is
    waited for somebody who can do so."""
    on_attempts: int = 3
    """A fenced host whose BMC still says off `off_retry_seconds` after the order is ordered on so often."""
    brake_percent: float = 10.0
    """At most this share of a cluster's hosts, and at least one, are ordered off within `brake_window_seconds`."""
    brake_window_seconds: float = 600.0
    reboot_quiet_seconds: float = 600.0
    """A host that a person switched, or that said before that it is being shut down, is not fenced for this long, or until
    it is up under a new boot."""
    switch_quiet_seconds: float = 180.0
    """Between two switches of one host by hand."""
    test_seconds: float = 86400.0
    """How often power management is tested; what failed is tested again after a tenth of it."""
    try_peers_seconds: float = 10.0
    """How often hosts of its cluster try a silent host; a sixth as often once it has been silent for ten minutes.
    0: never."""
    read_lease_seconds: float = 5.0
    """How often a silent host's storage leases are read."""
    lease_again_seconds: float = 5.0
    """A restart that the lease of the VM's former host, or its lock on a disk, stands against is tried again after this, as
    often as it takes."""
    soft_fence_seconds: float = 15.0
    """To restart a silent host's agent over SSH: the connection, the login and the command. With `silence_seconds` it is
    over before power is touched. 0: never."""
    kdump_port: int = 0
    """The UDP port on which every ha hears `fence_kdump_send` of hosts that crashed (7410 is its own default); 0: none. Only
    hosts whose power management names `kdump_addresses` are believed."""
    kdump_finished_seconds: float = 60.0
    """A dump has ended this long after the last message of it: senders say something every 10 s."""
    kdump_longest_seconds: float = 1800.0
    """Power waits for a dump at most this long."""
    witnesses: str = ""
    """HOST:PORT of machines outside the clusters, separated by commas: when most hosts of a cluster are silent and these
    can't be reached either, ha itself is cut off. Without any, a cluster most of which is silent is left to a person."""
    key_file: str = ""
    """A file whose content encrypts the BMCs' passwords in the database; made when missing. Without one no passwords are
    taken."""

    protection_settle_seconds: float = 1.0
    """After a change of hosts, power management or fencing all VMs' protection is judged anew this much later: others
    hear of it, too."""
    protection_capacity_seconds: float = 30.0
    """After VMs came, went or moved, all the others' protection is judged anew within this."""
    protection_between_seconds: float = 5.0
    """All VMs' protection is judged at most this often."""
    protection_longest_seconds: float = 60.0
    """It is judged this often in any case: storage and networks may have changed."""

    def __post_init__(self) -> None:
        if not 0 <= self.kdump_port <= 65535:
            raise ValueError(
                f"kdump_port is {self.kdump_port}, but a UDP port is 1 to 65535, and 0 hears nothing"
            )
        if self.silence_before_fence_seconds < LEAST_SILENCE_SECONDS:
            raise ValueError(
                f"silence_before_fence_seconds is {self.silence_before_fence_seconds:g}, but never below "
                f"{LEAST_SILENCE_SECONDS:g}: a host that is only cut off for a moment would be shot"
            )
