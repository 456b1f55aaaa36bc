"""ha's table: what it answers, hears and does by itself."""

from __future__ import annotations

from services.ha import listing, liveness, restarts
from services.ha.config import HaConfig
from services.ha.state import open_ha
from volery.contracts.base import Owner
from volery.runtime.service import Service

service = Service(
    name=Owner.HA,
    open=open_ha,
    config=HaConfig,
    parts=[liveness.part, restarts.part, listing.part],
    reconcile=restarts.look,
    on_gap=listing.facts_were_lost,
    on_lead=listing.leadership_begins,
)
