"""`volery host soft-fencing`: whether a silent host's agent is restarted over SSH before its power is touched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from volery.cli import output, work
from volery.cli.fencing import Name
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.base import Done
from volery.contracts.soft_fence import SetSoftFence, SoftFence

app = typer.Typer(help="Restarting a silent host's agent over SSH.", no_args_is_help=True)


@app.command("set")
def set_soft(
    name: Name,
    host_key_file: Annotated[
        Path, typer.Option(help="A copy of the host's /etc/ssh/ssh_host_ed25519_key.pub; - is stdin.")
    ],
    address: Annotated[str, typer.Option(help="Of its SSH server; the host's own address otherwise.")] = "",
    port: int = 22,
    username: str = "root",
    unit: Annotated[str, typer.Option(help="The agent's systemd unit on the host.")] = "volery-agent",
    enabled: Annotated[bool, typer.Option("--enabled/--disabled")] = True,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make another key pair.")] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Allow it. Put the line that is shown into the host's authorized_keys, then test it."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        question = SetSoftFence(
            id=host.id,
            address=address
            or host.address
            or output.fail(f"host {host.name} has no address: name --address"),
            host_key=(sys.stdin.read() if str(host_key_file) == "-" else host_key_file.read_text()).strip(),
            port=port,
            username=username,
            unit=unit,
            enabled=enabled,
            new_key=new_key,
        )
        found = client.send(Request("PUT", f"hosts/{host.id}/soft-fencing", SoftFence, body_of(question)))
    if output_format is not Format.TABLE:
        output.show(found, output_format)
        return
    sys.stdout.write(f"{found.authorized_key}\n")


@app.command("show")
def show(name: Name, output_format: Output = Format.TABLE) -> None:
    """Show it, and the line for the host's authorized_keys."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        output.show(client.send(Request("GET", f"hosts/{host.id}/soft-fencing", SoftFence)), output_format)


@app.command("list")
def list_(output_format: Output = Format.TABLE) -> None:
    """Show the hosts that allow it."""
    work.show_all(api.SOFT_FENCES, output_format)


@app.command("test")
def log_in(name: Name, output_format: Output = Format.TABLE) -> None:
    """Log in, and out again."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        found = client.send(Request("POST", f"hosts/{host.id}/soft-fencing/test", SoftFence, b"{}"))
        output.show(found, output_format)
    if not found.test_passed:
        raise SystemExit(1)


@app.command("delete")
def delete(name: Name) -> None:
    """Forget it, and ha's key for the host."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        client.send(Request("DELETE", f"hosts/{host.id}/soft-fencing", Done))
    output.out.print(f"soft fencing of {name}: deleted")
