"""Every setting of the gateway (section VOLERY_GATEWAY_)."""

from __future__ import annotations

import msgspec


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_GATEWAY_: where it listens, and its bounds."""

    listen: str = "127.0.0.1:8443"
    """host:port; port 0 takes a free one (see `port_file`). IPv6 as [::1]:8443."""
    certificate: str = ""
    """PEM file of the server's certificate and its chain; empty: plain HTTP, for tests and behind a TLS proxy.
    It is read again when it changes, so a renewal needs no restart."""
    key: str = ""
    """PEM file of the certificate's private key."""
    ca: str = ""
    """PEM file of Volery's certificate authority: served at /ca.pem, and what hosts' data servers must prove.
    Empty: data servers are reached without TLS (tests only)."""
    certificate_check_seconds: float = 30.0
    """How often the certificate's file is looked at for a renewed one."""
    port_file: str = ""
    """Where the port that was bound is written, for port 0; empty: nowhere."""
    body_limit_bytes: int = 1024 * 1024
    """Largest JSON body; images go through /transfers and have no limit."""
    call_attempt_seconds: float = 4.0
    """How long one attempt of a call may take before it is asked again under the same request id. A replica that
    was killed with the question in its hands costs this much."""
    call_total_seconds: float = 12.0
    """How long a request may take in all before it is answered 504 (outcome unknown)."""
    wait_limit_seconds: float = 60.0
    """Most that `Prefer: wait=N` waits; proxies tend to cut silent requests after a minute."""
    token_cache_seconds: float = 30.0
    """How long a checked token is believed. A deleted one is forgotten at once when its fact is heard, so this
    only bounds what a gateway that is cut off from the bus still admits."""
    login_attempts_per_minute: int = 20
    """Per client address, and per account name: guessing passwords is slow and costs inventory CPU."""
    ring_events: int = 10_000
    """Events kept in memory for clients that resume; older ones come from the streams."""
    ring_bytes: int = 16 * 1024 * 1024
    """Likewise, in bytes."""
    ring_preload_events: int = 1000
    """Newest events of each owner read at start, so that clients of a restarted gateway resume from memory."""
    heartbeat_seconds: float = 15.0
    """A silent stream carries a sign of life, with its newest cursor, this often."""
    stuck_client_seconds: float = 30.0
    """A streaming client that takes no bytes for this long is disconnected; it resumes with its cursor."""
    catch_ups: int = 16
    """Clients that read old events from the streams at the same time; others wait."""
    shutdown_seconds: float = 10.0
    """How long requests at work may take to end when the gateway stops."""

    def __post_init__(self) -> None:
        """Raises ValueError, which `read` turns into a ConfigError."""
        self.address()

    def address(self) -> tuple[str, int]:
        """Host, without an IPv6 address's brackets, and port to listen on."""
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"VOLERY_GATEWAY_LISTEN must be host:port, not {self.listen!r}")
        return host.strip("[]"), int(port)
