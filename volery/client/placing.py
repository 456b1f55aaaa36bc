"""Questions about placement: where a VM would run now, and a past decision in full."""

from __future__ import annotations

import msgspec

from volery.client import api
from volery.client.request import Request
from volery.contracts.operation import Operation
from volery.contracts.scheduling import Placement


def explain_vm(vm_id: str, host_id: str = "") -> Request[Operation]:
    """Where could it run, and why not elsewhere? Changes nothing; `placement_of` reads the answer."""
    return api.VMS.act(vm_id, "explain", Operation, {"host_id": host_id} if host_id else {})


def placement_of(plan: Operation) -> Placement:
    """The decision in a plan: of `explain_vm`, and of a start or migration with `dry_run`."""
    return msgspec.convert(plan.result["placement"], Placement)


def past_decision(decision_id: str) -> Request[Placement]:
    """As it was explained then; `api.DECISIONS` lists them in short."""
    return Request("GET", f"{api.DECISIONS.path}/{decision_id}", Placement)
