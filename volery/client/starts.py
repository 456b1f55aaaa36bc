"""Starting many VMs in one call: the request, and what became of each."""

from __future__ import annotations

import msgspec

from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.operation import Operation
from volery.contracts.vm_starts import StartVms, VmStart


def start_vms(question: StartVms) -> Request[Operation]:
    """`starts_of` reads the answer, also of a dry run, and the operation while it goes on."""
    path = f"{api.VMS.path}/start"
    return Request("POST", path, Operation, body_of(question), dry_run=question.dry_run)


def starts_of(operation: Operation) -> tuple[VmStart, ...]:
    """What became of each so far; none before hosts were chosen."""
    return msgspec.convert(operation.result.get("vms", ()), tuple[VmStart, ...])
