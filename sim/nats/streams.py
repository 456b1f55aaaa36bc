"""JetStream in memory, as far as Volery uses it: streams with expected sequences, ephemeral push consumers.

Answers to `$JS.API.>` are the JSON that nats-server gives, so that nats-py's own JetStreamContext works on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sim.nats.subjects import tokens_match

API = "$JS.API."
EXPECTED = "Nats-Expected-Last-Sequence"
INACTIVE_SECONDS = 30.0
CREATED = "2026-01-01T00:00:00Z"
NOT_FOUND_STREAM = {"code": 404, "err_code": 10059, "description": "stream not found"}
NOT_FOUND_CONSUMER = {"code": 404, "err_code": 10014, "description": "consumer not found"}
NAME_IN_USE = {
    "code": 400,
    "err_code": 10058,
    "description": "stream name already in use with a different configuration",
}

Deliver = Callable[[str, str, str, bytes, Mapping[str, str] | None], bool]
"""(deliver subject, subject, reply, data, headers) → whether anybody is interested"""


@dataclass(slots=True)
class Stored:
    subject: str
    data: bytes
    headers: Mapping[str, str] | None


@dataclass(slots=True, eq=False)
class Consumer:
    name: str
    stream: Stream
    deliver_subject: str
    filters: list[list[str]]
    position: int
    """The next sequence to look at."""
    delivered: int = 0
    heartbeat_seconds: float = 0.0
    spoke_at: float = 0.0
    alone_since: float | None = None
    """Since when nobody listens to it."""
    known: dict[str, bool] = field(default_factory=dict)

    def wants(self, subject: str) -> bool:
        found = self.known.get(subject)
        if found is None:
            tokens = subject.split(".")
            found = not self.filters or any(tokens_match(pattern, tokens) for pattern in self.filters)
            self.known[subject] = found
        return found

    def push(self, deliver: Deliver, now: float) -> None:
        """Hand over what is new."""
        stream = self.stream
        self.position = max(self.position, stream.first)
        while self.position <= stream.last:
            stored = stream.messages.get(self.position)
            if stored is not None and self.wants(stored.subject):
                reply = (
                    f"$JS.ACK.{stream.name}.{self.name}.1.{self.position}.{self.delivered + 1}.0."
                    f"{stream.last - self.position}"
                )
                if not deliver(self.deliver_subject, stored.subject, reply, stored.data, stored.headers):
                    self.alone_since = now if self.alone_since is None else self.alone_since
                    return
                self.delivered += 1
                self.spoke_at, self.alone_since = now, None
            self.position += 1


@dataclass(slots=True, eq=False)
class Stream:
    name: str
    config: dict[str, Any]
    patterns: list[list[str]]
    first: int = 1
    last: int = 0
    messages: dict[int, Stored] = field(default_factory=dict)
    consumers: dict[str, Consumer] = field(default_factory=dict)

    def info(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "created": CREATED,
            "state": {
                "messages": len(self.messages),
                "bytes": 0,
                "first_seq": self.first,
                "last_seq": self.last,
                "consumer_count": len(self.consumers),
            },
        }


@dataclass(slots=True)
class JetStream:
    """The streams of one server."""

    deliver: Deliver
    now: Callable[[], float]
    streams: dict[str, Stream] = field(default_factory=dict)
    stream_of: dict[str, Stream | None] = field(default_factory=dict)
    made: int = 0

    def find(self, subject: str) -> Stream | None:
        """The stream that keeps this subject."""
        if subject not in self.stream_of:
            tokens = subject.split(".")
            found = (s for s in self.streams.values() if any(tokens_match(p, tokens) for p in s.patterns))
            self.stream_of[subject] = next(found, None)
        return self.stream_of[subject]

    def store(
        self, stream: Stream, subject: str, data: bytes, headers: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """What the publisher is told."""
        expected = headers.get(EXPECTED) if headers else None
        if expected is not None and int(expected) != stream.last:
            description = f"wrong last sequence: {stream.last}"
            return {
                "error": {"code": 400, "err_code": 10071, "description": description},
                "stream": stream.name,
                "seq": 0,
            }
        stream.last += 1
        stream.messages[stream.last] = Stored(subject, data, headers)
        for consumer in stream.consumers.values():
            if consumer.alone_since is None:
                consumer.push(self.deliver, self.now())
        return {"stream": stream.name, "seq": stream.last}

    def lose(self) -> None:
        """Somebody deleted the whole store."""
        self.streams.clear()
        self.stream_of.clear()

    def beat(self) -> None:
        """Consumers that were quiet say that they live; those that nobody listens to are forgotten."""
        now = self.now()
        for stream in self.streams.values():
            for consumer in list(stream.consumers.values()):
                self._tend(stream, consumer, now)

    def _tend(self, stream: Stream, consumer: Consumer, now: float) -> None:
        if consumer.alone_since is not None:
            consumer.push(self.deliver, now)
        quiet = consumer.heartbeat_seconds and now - consumer.spoke_at >= consumer.heartbeat_seconds
        if quiet and (consumer.alone_since is None or consumer.position > stream.last):
            headers = {"Status": "100", "Description": "Idle Heartbeat"}
            if self.deliver(consumer.deliver_subject, consumer.deliver_subject, "", b"", headers):
                consumer.spoke_at, consumer.alone_since = now, None
            elif consumer.alone_since is None:
                consumer.alone_since = now
        if consumer.alone_since is not None and now - consumer.alone_since > INACTIVE_SECONDS:
            del stream.consumers[consumer.name]

    # The API

    def answer(self, subject: str, data: bytes) -> dict[str, Any]:
        """The answer to a request under `$JS.API.`"""
        noun, verb, *names = subject.removeprefix(API).split(".")
        body = json.loads(data) if data else {}
        if (noun, verb) == ("STREAM", "CREATE"):
            return self._create_stream(names[0], body)
        stream = self.streams.get(names[0])
        if stream is None:
            return {"error": NOT_FOUND_STREAM}
        match noun, verb:
            case "STREAM", "INFO":
                return stream.info()
            case "STREAM", "DELETE":
                del self.streams[stream.name]
                self.stream_of.clear()
                return {"success": True}
            case "STREAM", "PURGE":
                return self._purge(stream, int(body.get("seq") or stream.last + 1))
            case "CONSUMER", "CREATE":
                return self._create_consumer(stream, body["config"])
            case "CONSUMER", "DELETE":
                gone = stream.consumers.pop(names[1], None)
                return {"success": True} if gone else {"error": NOT_FOUND_CONSUMER}
            case "CONSUMER", "INFO":
                known = stream.consumers.get(names[1])
                return _consumer_info(known, {}) if known else {"error": NOT_FOUND_CONSUMER}
        return {"error": {"code": 400, "err_code": 10025, "description": f"not in memory: {subject}"}}

    def _create_stream(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        known = self.streams.get(name)
        if known is not None:
            return known.info() if known.config == config else {"error": NAME_IN_USE}
        first = int(config.get("first_seq") or 1)
        patterns = [subject.split(".") for subject in config.get("subjects") or [name]]
        stream = Stream(name, config, patterns, first=first, last=first - 1)
        self.streams[name] = stream
        self.stream_of.clear()
        return stream.info()

    def _purge(self, stream: Stream, seq: int) -> dict[str, Any]:
        gone = [number for number in stream.messages if number < seq]
        for number in gone:
            del stream.messages[number]
        stream.first = max(stream.first, min(seq, stream.last + 1))
        return {"success": True, "purged": len(gone)}

    def _create_consumer(self, stream: Stream, config: dict[str, Any]) -> dict[str, Any]:
        self.made += 1
        filters = config.get("filter_subjects") or [f for f in (config.get("filter_subject"),) if f]
        consumer = Consumer(
            name=config.get("durable_name") or config.get("name") or f"C{self.made:07d}",
            stream=stream,
            deliver_subject=config.get("deliver_subject") or "",
            filters=[one.split(".") for one in filters],
            position=int(config.get("opt_start_seq") or 1),
            heartbeat_seconds=float(config.get("idle_heartbeat") or 0) / 1e9,
            spoke_at=self.now(),
        )
        stream.consumers[consumer.name] = consumer
        if consumer.deliver_subject:
            consumer.push(self.deliver, self.now())
        return _consumer_info(consumer, config)


def _consumer_info(consumer: Consumer, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "stream_name": consumer.stream.name,
        "name": consumer.name,
        "created": CREATED,
        "config": {"name": consumer.name, **config},
        "delivered": {"consumer_seq": consumer.delivered, "stream_seq": consumer.position - 1},
        "ack_floor": {"consumer_seq": 0, "stream_seq": 0},
        "num_ack_pending": 0,
        "num_redelivered": 0,
        "num_waiting": 0,
        "num_pending": max(0, consumer.stream.last - consumer.position + 1),
    }
