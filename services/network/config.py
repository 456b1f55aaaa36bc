"""Every setting of network, from the environment with the prefix VOLERY_NETWORK_."""

from __future__ import annotations

from typing import Annotated

import msgspec

SUFFIX = r"^[a-z0-9]{0,5}$"


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device_suffix: Annotated[str, msgspec.Meta(pattern=SUFFIX)] = ""
    """Ends the name of every bridge, at most 5 small letters and digits: installations on one machine differ by it."""
    apply_seconds: float = 60.0
    """How long a host may take to apply its networks, its own check included."""
    check_seconds: float = 20.0
    """How long a host looks for the control plane after a change before it puts everything back."""
    again_seconds: float = 30.0
    """Between attempts on a host that could not apply its networks."""
    prepare_seconds: float = 30.0
    """How long a start of a VM waits for its networks on the host."""
    report_seconds: float = 60.0
    """How often every host is asked how its networks are."""
    lost_after_seconds: float = 60.0
    """A host that was without a required network for so long, while another host of its cluster had it, has lost it and
    becomes non-operational. A switch's port that comes up forwards only after up to 50 s (spanning tree)."""
    back_after_seconds: float = 60.0
    """A host that has lost a network and has it again for so long has it back."""
    nat_range: str = "10.64.0.0/10"
    """Where subnets for NAT networks are picked from."""
