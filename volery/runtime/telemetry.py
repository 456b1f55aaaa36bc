"""Traces, metrics and structured logs. Every log line carries the trace and the operation it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from volery.runtime.config import TelemetryConfig

operation_id: ContextVar[str] = ContextVar("operation_id", default="")
service_name: ContextVar[str] = ContextVar("service_name", default="")

tracer = trace.get_tracer("volery")
_no_span = nullcontext(trace.INVALID_SPAN)
_exporting = False
"""Whether `configure` was given a collector."""
meter = metrics.get_meter("volery")

calls_total = meter.create_counter(
    "volery.calls", description="Calls answered, by subject and kind of answer"
)
call_seconds = meter.create_histogram("volery.call.duration", unit="s")
facts_relayed = meter.create_counter(
    "volery.facts.relayed", description="Facts moved to the stream, by owner"
)
facts_heard = meter.create_counter("volery.facts.heard", description="Facts consumed, by service")
operations_ended = meter.create_counter("volery.operations.ended", description="By kind and final state")
orders_ended = meter.create_counter("volery.orders.ended", description="By kind and outcome")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, logger, message, service, operation, trace; never a payload."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if service := service_name.get():
            line["service"] = service
        if operation := operation_id.get():
            line["operation"] = operation
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace"] = trace.format_trace_id(span.trace_id)
        line |= getattr(record, "fields", {})  # `extra={"fields": …}`: who did what, in the audit
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(program: str, config: TelemetryConfig) -> None:
    """Set up logging for the process and, when an endpoint is given, exporters for traces and metrics."""
    global _exporting
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    for noisy in ("nats", "uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not config.otlp_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    _exporting = True
    resource = Resource.create({"service.name": f"volery-{program}"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{config.otlp_endpoint}/v1/traces")))
    trace.set_tracer_provider(provider)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{config.otlp_endpoint}/v1/metrics"))
    metrics.set_meter_provider(MeterProvider(resource=resource, metric_readers=[reader]))


def inject(headers: dict[str, str]) -> dict[str, str]:
    """The headers with the current trace context, for the next hop."""
    if trace.get_current_span().get_span_context().is_valid:
        propagate.inject(headers)
    return headers


def extract(headers: Mapping[str, str] | None) -> Context | None:
    """The trace context that came in headers, or None."""
    if not headers or "traceparent" not in headers:
        return None
    return propagate.extract(headers)


def answering(subject: str, headers: Mapping[str, str] | None) -> AbstractContextManager[trace.Span]:
    """The span of a call that is answered. None is made, since it costs more than the call's JSON, where nobody
    collects spans and the caller has no trace that log lines could name."""
    context = extract(headers)
    if context is None and not _exporting:
        return _no_span
    return tracer.start_as_current_span(subject, context=context, kind=trace.SpanKind.SERVER)


@contextmanager
def within_operation(op_id: str) -> Iterator[None]:
    """Log lines inside belong to this operation."""
    token = operation_id.set(op_id)
    try:
        yield
    finally:
        operation_id.reset(token)
