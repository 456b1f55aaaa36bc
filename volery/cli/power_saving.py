"""`volery host save-power`, `volery host wake`: a host that is not needed is switched off, and on again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import work
from volery.cli.output import Format
from volery.cli.work import DryRun, Output, Wait
from volery.client import api
from volery.contracts.operation import Operation

Name = Annotated[str, typer.Argument(help="Name or id of the host.")]


def save_power(
    name: Name,
    reason: str = "",
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Move all VMs away, then switch the host off through its BMC until it is woken."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        body: dict[str, Any] = {"reason": reason}
        request = api.HOSTS.act(host.id, "save-power", Operation, body, dry_run=dry_run)
        work.finish(client, client.send(request), wait, output_format)


def wake(name: Name, reason: str = "", wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Switch a sleeping host on, and use it again once it has reported."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        request = api.HOSTS.act(host.id, "wake", Operation, {"reason": reason})
        work.finish(client, client.send(request), wait, output_format)
