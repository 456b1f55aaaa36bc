"""`volery events`, `volery console`, `volery operation`: what happens, live."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import msgspec
import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output, Wait
from volery.client import api
from volery.client.request import Request
from volery.client.transport import Client, problem_of
from volery.contracts.operation import Operation

operations = typer.Typer(help="What takes time.", no_args_is_help=True)
work.add_common(operations, api.OPERATIONS, deletes=False)
DETACH = b"\x1d"
"""Ctrl-]"""


@operations.command()
def cancel(name: str, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Cancel an operation; it leaves nothing behind."""
    with work.connected() as client:
        op = client.send(Request("POST", f"operations/{name}/cancel", Operation, b"{}"))
        work.finish(client, op, wait, output_format)


@operations.command("wait")
def wait_for(name: str, output_format: Output = Format.TABLE) -> None:
    """Wait until an operation has ended."""
    with work.connected() as client:
        work.finish(client, client.send(api.OPERATIONS.get(name)), True, output_format)


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what comes.")] = True,
    types: Annotated[str, typer.Option(help="Comma-separated, e.g. inventory.vm.changed")] = "",
    after: Annotated[str, typer.Option(help="A cursor; else from now on.")] = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Follow the event stream; a cut connection goes on where it was."""
    with work.connected() as client:
        cursor = after
        while True:
            try:
                for position, event in _stream(client, cursor, types):
                    cursor = position
                    _show(event, output_format)
            except httpx.TransportError as error:
                output.err.print(
                    f"the stream was cut ({error or type(error).__name__}); going on", style="dim"
                )
            if not follow:
                return
            time.sleep(0.5)


def _stream(client: Client, after: str, types: str) -> Any:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    params = {"types": types} if types else {}
    with client.http.stream("GET", "/api/v1/events", headers=headers, params=params, timeout=60) as answer:
        if answer.status_code >= 400:
            answer.read()
            raise problem_of(answer)
        cursor, data = after, ""
        for line in answer.iter_lines():
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                cursor = value
            elif name == "data":
                data += value
            elif not line and data:
                yield cursor, data
                data = ""


def _show(event: str, form: Format) -> None:
    if form is Format.JSON:
        sys.stdout.write(event + "\n")
        sys.stdout.flush()
        return
    fields = msgspec.json.decode(event, type=dict[str, Any])
    data = fields.get("data", {})
    state = data.get("status") or data.get("state") or ""
    name = data.get("name") or data.get("object_name") or ""
    kind = fields.get("type", "").removeprefix("dev.volery.")
    about = f"{name} {state}".strip() or fields.get("subject", "")
    extra = f" {data['kind']} {data.get('progress', 0):.0f}%" if "operation" in kind else ""
    output.out.print(f"{fields.get('time', '')[:19]}  {kind:34} {about}{extra}")


def console(name: str) -> None:
    """A VM's serial console; leave with Ctrl-]."""
    from websockets.sync.client import connect

    with work.connected() as client:
        vm = client.find(api.VMS, name)
        known = client.session
        parts = urlsplit(known.url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        context = None
        if scheme == "wss":
            import ssl

            context = ssl.create_default_context(cafile=known.ca_file or None)
        url = f"{scheme}://{parts.netloc}/api/v1/vms/{vm.id}/console?kind=serial"
        headers = {"Authorization": f"Bearer {known.token}"}
        with connect(url, ssl=context, additional_headers=headers, max_size=None) as socket:
            output.err.print(f"connected to {vm.name}; leave with Ctrl-]")
            _bridge(socket)


def _bridge(socket: Any) -> None:
    """Keyboard to socket, socket to screen, until Ctrl-] or the end."""
    done = threading.Event()

    def show() -> None:
        for chunk in socket:
            sys.stdout.buffer.write(chunk if isinstance(chunk, bytes) else chunk.encode())
            sys.stdout.buffer.flush()
        done.set()

    threading.Thread(target=show, daemon=True).start()
    keyboard = sys.stdin.fileno()
    terminal = termios.tcgetattr(keyboard) if os.isatty(keyboard) else None
    if terminal:
        tty.setraw(keyboard)
    try:
        while not done.is_set():
            ready, _, _ = select.select([keyboard], [], [], 0.2)
            if not ready:
                continue
            typed = os.read(keyboard, 1024)
            if not typed or DETACH in typed:
                return
            socket.send(typed)
    finally:
        if terminal:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, terminal)
