"""ha's table: what it answers, hears and does by itself."""

from __future__ import annotations

from services.ha import (
    confirming,
    fencing,
    fencing_policies,
    leases,
    listing,
    liveness,
    pauses,
    peers,
    power,
    power_saving,
    protection,
    reserve,
    restarts,
    rooms,
    soft_fencing,
    start_groups,
)
from services.ha.config import HaConfig
from services.ha.opening import open_ha
from services.ha.state import Ha
from volery.contracts.base import Owner
from volery.runtime.service import Service


async def reconcile(ha: Ha, key: str) -> None:
    """The restarts of all VMs, or one silent host."""
    if key == restarts.KEY:
        await restarts.look(ha, key)
    else:
        await fencing.treat(ha, key)


service = Service(
    name=Owner.HA,
    open=open_ha,
    config=HaConfig,
    parts=[
        liveness.part,
        power.part,
        power_saving.part,
        pauses.part,
        fencing_policies.part,
        confirming.part,
        fencing.part,
        soft_fencing.part,
        leases.part,
        peers.part,
        restarts.part,
        protection.part,
        reserve.part,
        rooms.part,
        start_groups.part,
        listing.part,
    ],
    reconcile=reconcile,
    on_gap=listing.facts_were_lost,
    on_lead=listing.leadership_begins,
)
