"""Where the agent's image and console server listens: a port taken once and kept, so that its address stays."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from host_agent.config import AgentConfig

TRIES = 50


def address(config: AgentConfig) -> str:
    """host:port of the server: as configured, or with the free port that this host took at its first start."""
    host, port = split(config.data_address)
    if port:
        return config.data_address
    kept = Path(config.state_dir) / "data_port"
    try:
        return joined(host, int(kept.read_text()))
    except FileNotFoundError:
        port = free_port(host)
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.write_text(f"{port}\n")
        return joined(host, port)


def split(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(config: AgentConfig) -> socket.socket:
    """The listening socket. Raises OSError when somebody else has the port."""
    host, port = split(address(config))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


def free_port(host: str) -> int:
    """Outside the range that the kernel hands to outgoing connections, so that it is free next time too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(TRIES):
        port = 10_000 + int.from_bytes(os.urandom(2), "big") % 20_000
        with socket.socket(family) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port was found on {host}")
