"""Operations, events, enrolment, health: what holds for every noun, or for none."""

from __future__ import annotations

from api_gateway import enrolment, health, index, operations, sockets, streams, upkeep
from api_gateway.openapi_parts import answer_of, body_of, page_of, parameter, text_of
from api_gateway.route import Special
from api_gateway.sockets import SocketRoute
from volery.contracts import enrolment as e
from volery.contracts.account import Scope
from volery.contracts.operation import Operation

OPERATIONS, EVENTS, ENROLMENT, HEALTH = "Operations", "Events", "Enrolment", "Health"

LIST_PARAMETERS = (
    parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
    parameter("page", {"type": "string"}, "Token of the former answer (`next`)"),
    parameter("order_by", {"type": "string", "enum": ["id", "-id"]}, "id is by creation, -id newest first"),
    parameter("fields", {"type": "string"}, "Only these fields, separated by commas"),
    parameter("filter.object_id", {"type": "string"}),
    parameter("filter.state", {"type": "string"}),
)
EVENT_PARAMETERS = (
    parameter("after", {"type": "string"}, "Cursor: the id of the last event that was received"),
    parameter(
        "types",
        {"type": "string"},
        "CloudEvents types, separated by commas, * at the end for any: inventory.vm.*",
    ),
    parameter("subject", {"type": "string"}, "CloudEvents subjects, likewise: vm/0199…"),
)
HOST_ENROLMENT_NOTE = "For host agents; the one-time token is the permission."

ROUTES = (
    Special("GET", "", index.index, HEALTH, "What there is", scope=None,
            responses={200: {"description": "Links to every collection",
                             "content": {"application/json": {"schema": {"type": "object"}}}}}),
    Special("GET", "/operations", operations.listed, OPERATIONS, "List operations of all services",
            parameters=LIST_PARAMETERS, refuses=(400,),
            responses={200: page_of(Operation, "A page; `missing` names services that did not answer")}),
    Special("GET", "/operations/{id}", operations.get, OPERATIONS, "Get an operation",
            refuses=(400, 404, 503, 504),
            responses={200: answer_of(Operation, "The operation", etag=True),
                       304: {"description": "Still as If-None-Match says"}}),
    Special("DELETE", "/operations/{id}", operations.cancel, OPERATIONS, "Cancel an operation", scope=Scope.WRITE,
            mutates=True, refuses=(400, 404, 409, 503, 504),
            responses={202: answer_of(Operation, "It is being cancelled, or has ended already", etag=True)}),
    Special("POST", "/operations/{id}/cancel", operations.cancel, OPERATIONS, "Cancel an operation", scope=Scope.WRITE,
            mutates=True, refuses=(400, 404, 409, 503, 504),
            responses={202: answer_of(Operation, "It is being cancelled, or has ended already", etag=True)}),
    Special("GET", "/events", streams.sse, EVENTS, "Follow events (SSE)", parameters=EVENT_PARAMETERS,
            note="Every event's id is a cursor: send it as Last-Event-ID (browsers do) or `after` to go on without "
                 "a gap or a repeat; without one it begins now. 410: list again. Also as WebSocket at "
                 "/api/v1/events/ws, in messages of cursor and event.",
            refuses=(400, 410, 503),
            responses={200: {"description": "An endless stream of CloudEvents",
                             "content": {"text/event-stream": {"schema": {"type": "string"}}}}}),
    Special("POST", "/enrolment", enrolment.enrol, ENROLMENT, "Enrol a host", scope=None, mutates=True,
            note=HOST_ENROLMENT_NOTE, request_body=body_of(e.Enrol), refuses=(400, 401, 403, 404, 409, 413, 415, 429, 503, 504),
            responses={200: answer_of(e.Enrolled, "What the host needs to join")}),
    Special("POST", "/enrolment/renew", enrolment.renew, ENROLMENT, "Renew a host's certificate", scope=None,
            mutates=True, note="Signed with the host's key in the header Volery-Signature.",
            request_body=body_of(e.RenewCertificate), refuses=(400, 401, 403, 404, 409, 413, 415, 503, 504),
            responses={200: answer_of(e.CertificateRenewed, "Everything that may have changed")}),
    Special("GET", "/ca.pem", health.ca, ENROLMENT, "The certificate authority", scope=None, prefix="",
            refuses=(404,), responses={200: text_of("application/x-pem-file", "A PEM certificate")}),
    Special("GET", "/health", upkeep.health, HEALTH, "How every service is", refuses=(400,),
            responses={200: answer_of(upkeep.Healths, "Each service, whether it answers, and why it waits if it does")}),
    Special("POST", "/streams/{owner}/rebuild", upkeep.rebuild, HEALTH, "Make a service's event stream anew",
            scope=Scope.ADMIN, mutates=True, refuses=(400, 404),
            note="Nothing is lost: it is published again from the database, and clients go on at their cursors.",
            responses={204: {"description": "Deleted; it comes back within a second"}}),
    Special("POST", "/hosts/{id}/excuse", upkeep.excuse, HEALTH, "Declare a host dead that a restore waits for",
            scope=Scope.ADMIN, mutates=True, refuses=(400, 404, 409, 413, 415), request_body=body_of(upkeep.Excuse),
            note="After a restore of an older database nothing is started until every host has reported. Only say "
                 "this of a host that is switched off for good: what it ran may be started elsewhere.",
            responses={204: {"description": "No service waits for it any more"}}),
    Special("GET", "/livez", health.live, HEALTH, "Whether this process answers", scope=None, prefix="",
            responses={200: text_of("text/plain", "ok")}),
    Special("GET", "/readyz", health.ready, HEALTH, "Whether every service answers", scope=None, prefix="",
            responses={200: answer_of(health.Readiness, "All do"), 503: answer_of(health.Readiness, "Some don't")}),
    Special("GET", "/metrics", health.metrics, HEALTH, "OpenMetrics of this gateway", scope=None, prefix="",
            responses={200: text_of("application/openmetrics-text", "Counters; nothing about any object")}),
)  # fmt: skip

SOCKETS = (SocketRoute("/events/ws", sockets.events, Scope.READ),)
