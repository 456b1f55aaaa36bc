"""The application: a table of endpoints in front of a FastAPI that serves the documentation.

The table is dispatched by a tree of path parts, since Starlette tries its routes one after another: with 150 of
them that costs more than the whole rest of a GET.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from api_gateway import docs, endpoint
from api_gateway.desk import Desk, audit
from api_gateway.exchange import Exchange, Gone, Receive, Send
from api_gateway.exchange import Scope as AsgiScope
from api_gateway.problems import HttpRefused
from api_gateway.route import PREFIX, Node, Route, Special
from api_gateway.sockets import WEBSOCKET, SocketRoute, serve_socket
from volery.contracts.errors import Kind, Refused
from volery.runtime import telemetry

log = logging.getLogger(__name__)

READS = frozenset({"GET", "HEAD"})
_STOPPING = (
    "this gateway is stopping and the outcome of the request is unknown: ask again in a few seconds, with the same "
    "Idempotency-Key if it changes anything"
)


class GatewayApp(FastAPI):
    """FastAPI for /docs and /openapi.json; the endpoints of the table are answered before it is asked."""

    def __init__(
        self, desk: Desk, table: Sequence[Route | Special], sockets: Sequence[SocketRoute] = ()
    ) -> None:
        super().__init__(title="Volery", docs_url=None, redoc_url=None, openapi_url=None)
        self.desk = desk
        self.table = table
        self.tree = Node()
        for row in table:
            prefix = row.prefix if isinstance(row, Special) else PREFIX
            self.tree.add(row.method, prefix + row.path, row)
        for socket in sockets:
            self.tree.add(socket.method, socket.prefix + socket.path, socket)
        docs.mount(self, table)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            node, values = self.tree.find(scope["path"])
            if node is not None and node.methods and (len(node.methods) > 1 or WEBSOCKET not in node.methods):
                parameters = dict(zip(node.names, values, strict=True)) if values else {}
                await self._answer(node, Exchange(scope, receive, send, parameters))
            elif docs.serves(scope["path"]):
                await super().__call__(scope, receive, send)
            else:
                await _not_found(Exchange(scope, receive, send))
        elif scope["type"] == "websocket":
            node, values = self.tree.find(scope["path"])
            await serve_socket(self.desk, node, values, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _answer(self, node: Node, http: Exchange) -> None:
        started = time.perf_counter()
        method = http.method
        row = node.methods.get(method)
        if row is None and method == "HEAD":
            row = node.methods.get("GET")
        span, token = self._trace(http, row)
        try:
            await self._serve(node, row, http)
        except Gone:
            return
        except Refused as refused:
            await _refuse(http, str(refused.kind), refused.message, refused.details)
        except HttpRefused as refused:
            await _refuse(http, refused.kind, refused.message, None, refused.headers)
        except asyncio.CancelledError:  # it stops, and what is still at work after its time of grace is cut
            await _refuse(http, Kind.UNAVAILABLE, _STOPPING)
        except Exception:  # the gateway's own loop: a bug is logged with its trace, never sent
            log.exception("%s %s failed", method, http.path)
            await _refuse(http, Kind.INTERNAL, "something went wrong inside Volery; its log has the reason")
        finally:
            seconds = time.perf_counter() - started
            if row is not None:
                streams = isinstance(row, Special)
                self.desk.meters.answered(method, row.path, http.status, None if streams else seconds)
                if method not in READS:
                    _audit(http, seconds)
            if span is not None:
                context.detach(token)
                span.end()

    async def _serve(self, node: Node, row: Route | Special | None, http: Exchange) -> None:
        if row is None:
            methods = set(node.methods) - {WEBSOCKET} | ({"HEAD"} if "GET" in node.methods else set())
            allowed = ", ".join(sorted(methods))
            raise HttpRefused(
                "method_not_allowed",
                f"{http.method} is not possible here; possible: {allowed}",
                ((b"allow", allowed.encode()),),
            )
        if isinstance(row, Route):
            await endpoint.serve(row, self.desk, http)
            return
        if row.scope is not None:
            await self.desk.door.admit(http, row.scope)
        await row.handler(self.desk, http)

    def _trace(self, http: Exchange, row: Route | Special | None) -> tuple[trace.Span | None, Any]:
        """Mutations are always traced, reads as often as configured. Without an exporter a mutation still gets a
        trace id, which the logs of all services have. Returns the span to end and the context to detach."""
        incoming = http.header(b"traceparent")
        if http.method in READS and not incoming and random.random() >= self.desk.trace_reads:  # noqa: S311
            if self.desk.trace_reads:
                # Without it each service would begin a trace of its own, and sample that.
                quiet = _fresh(sampled=False)
                return quiet, context.attach(trace.set_span_in_context(quiet))
            return None, None
        parent = telemetry.extract({"traceparent": incoming}) if incoming else None
        name = f"{http.method} {row.path if row is not None else '?'}"
        span = telemetry.tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        if not span.get_span_context().is_valid:
            span = _fresh(sampled=True)
        return span, context.attach(trace.set_span_in_context(span))


def _fresh(*, sampled: bool) -> trace.Span:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    ids = random.getrandbits(128) or 1, random.getrandbits(64) or 1
    return NonRecordingSpan(SpanContext(ids[0], ids[1], is_remote=False, trace_flags=flags))


async def _refuse(
    http: Exchange,
    kind: str,
    message: str,
    details: dict[str, Any] | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    if http.status:
        # The answer has begun: all that is left is to break it off, which the client sees as an incomplete one.
        log.warning("%s %s broke off: %s", http.method, http.path, message)
        return
    await http.problem(kind, message, details, headers)


async def _not_found(http: Exchange) -> None:
    await http.problem(
        Kind.NOT_FOUND, f"there is nothing at this path; {PREFIX} lists what there is, /docs explains it"
    )


def _audit(http: Exchange, seconds: float) -> None:
    principal = http.principal
    fields = {
        "principal": principal.principal if principal else "anonymous",
        "user": principal.user_name if principal else "",
        "token": principal.token_id if principal else "",
        "address": http.address,
        "method": http.method,
        "path": http.path[:300],
        "status": http.status,
        "request": (http.header(b"idempotency-key") or "")[:255],
        "operation": http.operation_id,
        "milliseconds": round(seconds * 1000, 1),
    }
    audit.info("%s %s %s", http.method, http.path[:300], http.status, extra={"fields": fields})
