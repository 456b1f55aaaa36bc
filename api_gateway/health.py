"""/livez, /readyz, /metrics, /ca.pem and the index of /api/v1: what machines ask before they ask anything else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange
from api_gateway.meters import BUCKETS_SECONDS, Meters
from api_gateway.upkeep import ask_health
from volery.contracts.base import Owner, encode
from volery.contracts.errors import not_found

TEXT = (b"content-type", b"text/plain; charset=utf-8")
OPENMETRICS = (b"content-type", b"application/openmetrics-text; version=1.0.0; charset=utf-8")
PEM = (b"content-type", b"application/x-pem-file")


class Readiness(msgspec.Struct):
    ready: bool
    bus: bool
    services: dict[str, bool]
    """Whether each service answers a small question."""
    quarantine: dict[str, str]
    """Services that, after a restore of an older database, wait for hosts before they start anything: why."""


async def live(desk: Desk, http: Exchange) -> None:
    await http.answer(200, b"ok\n", [TEXT])


async def ready(desk: Desk, http: Exchange) -> None:
    """200 when every service answers, else 503; both say which do."""
    connected = desk.bus.client.is_connected
    found = await asyncio.gather(*(ask_health(desk, owner) for owner in Owner)) if connected else []
    services = {str(one.service): one.answers for one in found}
    quarantine = {
        str(one.service): one.health.quarantine for one in found if one.health and one.health.quarantine
    }
    everything = connected and all(services.values())
    body = encode(Readiness(everything, connected, services, quarantine))
    await http.answer(200 if everything else 503, body)


async def ca(desk: Desk, http: Exchange) -> None:
    """The certificate authority, for anybody: a host checks it against the fingerprint in its token."""
    if not desk.config.ca:
        raise not_found("certificate authority", "of this gateway (it serves plain HTTP)")
    pem = await asyncio.to_thread(Path(desk.config.ca).read_bytes)
    await http.answer(200, pem, [PEM])


async def metrics(desk: Desk, http: Exchange) -> None:
    await http.answer(200, render(desk).encode(), [OPENMETRICS])


def render(desk: Desk) -> str:
    """OpenMetrics text of the gateway's own counters."""
    meters, feed = desk.meters, desk.feed
    lines = ["# TYPE volery_http_requests counter"]
    lines += [
        f'volery_http_requests_total{{method="{method}",path="{path}",status="{status}"}} {count}'
        for (method, path, status), count in sorted(meters.requests.items())
    ]
    lines += _durations(meters)
    gauges = {
        "volery_event_clients": meters.streams,
        "volery_event_ring_events": feed.next - feed.first,
        "volery_event_ring_bytes": feed.bytes_kept,
        "volery_bus_connected": int(desk.bus.client.is_connected),
    }
    for name, value in gauges.items():
        lines += [f"# TYPE {name} gauge", f"{name} {value}"]
    lines += ["# TYPE volery_event_stream_live gauge"]
    lines += [f'volery_event_stream_live{{owner="{s.owner}"}} {int(s.live)}' for s in feed.sources]
    lines += ["# TYPE volery_event_position gauge"]
    lines += [f'volery_event_position{{owner="{s.owner}"}} {s.position}' for s in feed.sources]
    lines += [
        "# TYPE volery_event_clients_lost counter",
        f"volery_event_clients_lost_total {meters.streams_lost}",
    ]
    lines += ["# TYPE volery_transfer_bytes counter"]
    lines += [f'volery_transfer_bytes_total{{direction="{d}"}} {n}' for d, n in meters.transfer_bytes.items()]
    return "\n".join([*lines, "# EOF", ""])


def _durations(meters: Meters) -> list[str]:
    lines = ["# TYPE volery_http_request_duration_seconds histogram"]
    name = "volery_http_request_duration_seconds"
    for method, histogram in sorted(meters.seconds.items()):
        seen = 0
        for bound, count in zip((*BUCKETS_SECONDS, "+Inf"), histogram.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{method="{method}",le="{bound}"}} {seen}')
        lines.append(f'{name}_count{{method="{method}"}} {seen}')
        lines.append(f'{name}_sum{{method="{method}"}} {histogram.total:.6f}')
    return lines
