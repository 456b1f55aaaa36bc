"""What an iSCSI portal offers, as a host sees it."""

from __future__ import annotations

from msgspec.structs import replace

from services.storage import domain_model
from services.storage.backends import iscsi
from services.storage.storage import Storage
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id
from volery.contracts.storage import DISCOVER_TARGETS, DiscoverTargets, Targets
from volery.contracts.volume_orders import DISCOVER_ISCSI, DiscoverIscsi
from volery.runtime.bus import Caller
from volery.runtime.service import Part

part = Part()
SECONDS = 28.0


@part.leader_answers(DISCOVER_TARGETS)
async def discover(svc: Storage, ask: DiscoverTargets, caller: Caller) -> Targets:
    """Raises Refused: no host is up, or the portal doesn't answer it."""
    ask = replace(ask, portal=iscsi.checked_portal(ask.portal))
    iscsi.checked_chap(ask.chap_user, ask.chap_password)
    if ask.host_id:
        checked_id("host", ask.host_id)
    hosts = await svc.connectable("", ask.host_id, f"asking portal {ask.portal}")
    question_id = new_id()
    found = await svc.core.orders.carry_out(
        DISCOVER_ISCSI,
        DiscoverIscsi(portal=ask.portal, chap_user=ask.chap_user, chap_password=ask.chap_password),
        host_id=domain_model.choose_host([host.id for host in hosts], question_id),
        object_id=question_id,
        timeout_seconds=SECONDS,
    )
    return Targets(targets=found.targets)
