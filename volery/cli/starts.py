"""`volery vm start` of many VMs: one call, and a table of what became of each."""

from __future__ import annotations

from volery.cli import output, work
from volery.cli.output import Format
from volery.client import starts
from volery.client.transport import Client, OperationFailed
from volery.contracts.operation import ENDED
from volery.contracts.vm_starts import StartVms

COLUMNS = ("name", "became", "host_name", "message")


def start(client: Client, question: StartVms, wait: bool, form: Format) -> None:
    operation = client.send(starts.start_vms(question))
    if operation.id and wait and operation.state not in ENDED:
        operation = work.follow(client, operation)
    if form is not Format.TABLE:
        output.show(operation if operation.id else operation.result, form)
    elif found := starts.starts_of(operation):
        output.show(list(found), form, COLUMNS)
    if form is Format.TABLE and operation.id and operation.state not in ENDED:
        output.out.print(f"{operation.kind} goes on as operation {operation.id}")
    if operation.problem is not None:
        raise OperationFailed(operation)
