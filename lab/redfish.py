"""A Redfish BMC for one host: as much of the specification as fence agents speak, over TLS.

`python -S -m lab.redfish STATE NAME NUMBER` serves the host's board on its BMC's address until it is killed.
"""

from __future__ import annotations

import base64
import hmac
import json
import ssl
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lab.board import Board, Fault

ROOT = "/redfish/v1"
SYSTEMS = f"{ROOT}/Systems"
SYSTEM = f"{SYSTEMS}/1"
RESET = f"{SYSTEM}/Actions/ComputerSystem.Reset"
RESETS: Mapping[str, tuple[bool, ...]] = {
    "On": (True,),
    "ForceOn": (True,),
    "ForceOff": (False,),
    "GracefulShutdown": (False,),
    "ForceRestart": (False, True),
    "PowerCycle": (False, True),
}
"""Kinds of reset, and what power does in turn. Nothing is asked of the operating system."""
MAX_BODY = 65536


class RedfishServer(ThreadingHTTPServer):
    """Listens when it is made; `serve_forever` answers. `server_port` is the port, also when 0 was asked for."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], board: Board, login: tuple[str, str], certificate: Path
    ) -> None:
        """`certificate`: PEM with key and certificate; `login`: user and password."""
        super().__init__(address, _Handler)
        self.board = board
        self.authorization = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # Here, in the connection's own thread: who connects and says nothing holds up nobody else.
        request.settimeout(60)
        try:
            with self._tls.wrap_socket(request, server_side=True) as connection:
                super().finish_request(connection, client_address)
        except OSError:
            return  # the other side went away, as one whose time was over does


class _Handler(BaseHTTPRequestHandler):
    server: RedfishServer

    def do_GET(self) -> None:
        if not self._admitted():
            return None
        resources: dict[str, dict[str, Any]] = {
            ROOT: {"Systems": {"@odata.id": SYSTEMS}, "RedfishVersion": "1.6.0"},
            SYSTEMS: {"Members": [{"@odata.id": SYSTEM}], "Members@odata.count": 1},
        }
        path = self.path.rstrip("/")
        if path == SYSTEM:
            return self._answer(200, self._system())
        if path in resources:
            return self._answer(200, {"@odata.id": path, **resources[path]})
        return self._answer(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        if not self._admitted():
            return None
        length = min(int(self.headers.get("content-length", "0")), MAX_BODY)
        try:
            kind = json.loads(self.rfile.read(length))["ResetType"]
            steps = RESETS[kind]
        except (ValueError, KeyError, TypeError):
            return self._answer(400, {"error": {"message": f"ResetType is one of {', '.join(RESETS)}"}})
        if self.path.rstrip("/") != RESET:
            return self._answer(404, {"error": {"message": f"there is no {self.path}"}})
        for on in steps:
            self.server.board.switch(on=on)
        return self._answer(204, None)

    def _system(self) -> dict[str, Any]:
        board = self.server.board
        return {
            "@odata.id": SYSTEM,
            "Id": "1",
            "UUID": board.uuid,
            "PowerState": "On" if board.says_on() else "Off",
            "Actions": {
                "#ComputerSystem.Reset": {
                    "target": RESET,
                    "ResetType@Redfish.AllowableValues": list(RESETS),
                }
            },
        }

    def _admitted(self) -> bool:
        said = self.headers.get("authorization", "")
        if self.server.board.fault is not Fault.REFUSES and hmac.compare_digest(
            said.encode(), self.server.authorization.encode()
        ):
            return True
        self._answer(401, {"error": {"message": "the user name or the password is wrong"}})
        return False

    def _answer(self, status: int, body: dict[str, Any] | None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.client_address[0]} {format % args}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    from lab.bmc import Bmc

    state, name, number = arguments
    bmc = Bmc.of(Path(state), name, int(number))
    server = RedfishServer((bmc.address, bmc.REDFISH_PORT), bmc.board, bmc.login, bmc.certificate)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
