"""`volery admin`: the installation itself."""

from __future__ import annotations

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request
from volery.contracts.base import Done, Owner

app = typer.Typer(help="The installation itself.", no_args_is_help=True)
claims = typer.Typer(help="Capacity that the scheduler holds.", no_args_is_help=True)
work.add_common(claims, api.CLAIMS, deletes=False)
liveness = typer.Typer(help="What ha knows of the hosts.", no_args_is_help=True)
work.add_common(liveness, api.LIVENESS, deletes=False)


@app.command("rebuild-streams")
def rebuild_streams(owner: Owner | None = None) -> None:
    """Delete the event streams and make them anew from PostgreSQL; nothing is lost, readers go on."""
    with work.connected() as client:
        for each in [owner] if owner else list(Owner):
            client.send(Request("POST", f"streams/{each}/rebuild", Done, b"{}"))
            output.out.print(f"{each}: deleted; its relay publishes the whole log again")


@app.command()
def status(output_format: Output = Format.TABLE) -> None:
    """Whether every service answers."""
    with work.connected() as client:
        answer = client.http.get("/readyz")
        output.show(answer.json(), output_format if output_format is not Format.TABLE else Format.YAML)
        if answer.status_code != 200:
            raise SystemExit(1)
