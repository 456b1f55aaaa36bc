"""Who may say and hear what on the bus: one table, from which every NATS user's permissions are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from volery.contracts.base import Owner

OWNERS: Final = tuple(owner.value for owner in Owner)
SERVICES: Final = (*OWNERS, "gateway", "setup")
"""Programs of the control plane: each has its own user, connection and inbox in the account VOLERY."""
COMMANDERS: Final = ("inventory", "storage", "network")
"""Owners that give orders to hosts. Agents pin their public keys and refuse every other signature."""
SIGNERS: Final = (*COMMANDERS, "ha")
"""Whose public keys agents pin: who gives orders, and ha, which has them switch other hosts' power."""
ANSWER_SECONDS: Final = 90.0
"""How long an agent may take to answer: a fence agent's longest time, and what lies around it."""
LISTENERS: Final = OWNERS
"""Commanders need beats to send orders, ha for its judgement; the scheduler and dwh live on samples."""
SYSTEM_USERS: Final = ("sys", "claims")
"""Users of the system account: `sys` watches connections and readiness, `claims` publishes revocations."""

ACCOUNTS: Final = ("SYS", "VOLERY", "READERS")
ACCOUNT_OF: Final[dict[str, str]] = {
    **dict.fromkeys(SERVICES, "VOLERY"),
    "agent": "VOLERY",
    "reader": "READERS",
    **dict.fromkeys(SYSTEM_USERS, "SYS"),
}
"""Each role has one scoped signing key in one account: whoever steals it can mint that role only."""

MICRO_VERBS: Final = ("PING", "INFO", "STATS")

HOST_STREAM: Final = "FACTS_HOST"


def stream_of(owner: str) -> str:
    """The JetStream stream with the facts of `owner`; `host` gives the agents' own."""
    return f"FACTS_{owner.upper()}"


OWNERS_STREAMS: Final = tuple(stream_of(owner) for owner in OWNERS)
STREAMS: Final = (*OWNERS_STREAMS, HOST_STREAM)

NAME: Final = "{{name()}}"
"""The server puts the user's own name here when it connects."""

_NAME_OF_ROLE: Final = {"agent": NAME, "reader": NAME}


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason to speak or listen. Placeholders: `{me}` the user's name, `{owner}` each owner,
    `{service}` each program, `{stream}` each stream, `{shared}` each owner's stream, `{mine}` own streams,
    `{verb}` what NATS micro answers about itself.
    """

    why: str
    who: tuple[str, ...]
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    answers_within_seconds: float = 0.0
    """May publish one message to the reply subject of each request it got, for so long."""


RULES: Final = (
    Rule("hears answers in its own inbox", (*SERVICES, *SYSTEM_USERS, "agent", "reader"),
         subscribe=("_INBOX.{me}.>",)),
    # Spelled out: a final `*` in an allowed subject would let it subscribe to `$SRV.>`.
    Rule("answers calls, and is discovered by its own name", OWNERS,
         subscribe=("{me}.>", "$SRV.{verb}", "$SRV.{verb}.{me}", "$SRV.{verb}.{me}.>")),
    # Not by allow_responses: it remembers every message with a reply subject, so also each one that a
    # consumer delivers, for as long as the slowest call may take.
    Rule("answers calls in the inbox of a program, never in an agent's", OWNERS,
         publish=("_INBOX.{service}.>",)),
    Rule("asks every owner", SERVICES, publish=("{owner}.>", "$SRV.>")),
    Rule("announces its own facts", OWNERS, publish=("fact.{me}.>",)),
    Rule("makes, deletes and purges its own streams", OWNERS,
         publish=("$JS.API.STREAM.CREATE.{mine}", "$JS.API.STREAM.UPDATE.{mine}",
                  "$JS.API.STREAM.DELETE.{mine}", "$JS.API.STREAM.PURGE.{mine}")),
    Rule("reads every stream through consumers", SERVICES,
         publish=("$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.{stream}",
                  "$JS.API.STREAM.MSG.GET.{stream}",
                  "$JS.API.CONSUMER.CREATE.{stream}", "$JS.API.CONSUMER.CREATE.{stream}.>",
                  "$JS.API.CONSUMER.DURABLE.CREATE.{stream}.*", "$JS.API.CONSUMER.INFO.{stream}.*",
                  "$JS.API.CONSUMER.LIST.{stream}",
                  "$JS.API.CONSUMER.DELETE.{stream}.*", "$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
                  "$JS.ACK.{stream}.>", "$JS.FC.{stream}.>")),
    Rule("wakes the relay in its other replicas", OWNERS,
         publish=("relay.{me}.wake",), subscribe=("relay.{me}.wake",)),
    Rule("orders, asks and confirms to hosts", COMMANDERS,
         publish=("host.*.order", "host.*.cancel", "host.*.committed", "host.*.report",
                  "host.*.ask", "host.*.ask.>")),
    Rule("has a host switch another's power, and try another", ("ha",), publish=("host.*.power", "host.*.try")),
    Rule("hears beats and metrics", LISTENERS, subscribe=("beat.host.*", "metrics.host.*")),
    Rule("speaks and listens as this host only", ("agent",),
         publish=("fact.host.{me}.>", "beat.host.{me}", "metrics.host.{me}"),
         subscribe=("host.{me}.>",), answers_within_seconds=ANSWER_SECONDS),
    Rule("follows facts through its own durable consumer", ("reader",),
         publish=("$JS.volery.API.CONSUMER.MSG.NEXT.{shared}.{me}",
                  "$JS.volery.API.CONSUMER.INFO.{shared}.{me}", "$JS.ACK.{shared}.{me}.>")),
    Rule("watches connections and readiness", ("sys",),
         publish=("$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.JSZ", "$SYS.REQ.SERVER.PING.VARZ"),
         subscribe=("$SYS.ACCOUNT.*.CONNECT", "$SYS.ACCOUNT.*.DISCONNECT")),
    Rule("publishes signed account claims", ("claims",),
         publish=("$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.ACCOUNT.*.CLAIMS.LOOKUP")),
)  # fmt: skip

SHARED_SUBJECTS: Final = tuple(
    subject.format(stream=stream)
    for stream in OWNERS_STREAMS
    for subject in (
        "$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        "$JS.API.CONSUMER.INFO.{stream}.*",
        "$JS.ACK.{stream}.>",
    )
)
"""All that VOLERY exports, and READERS imports."""

READERS_DOMAIN: Final = "volery"
"""The `domain` option with which a reader's client asks JetStream.

Imported under their own names the answers would be two: each account also has a JetStream API of its own,
which says first that JetStream isn't enabled here.
"""


def imported_as(subject: str) -> str:
    """What a shared subject is called in the account READERS."""
    return subject.replace("$JS.API.", f"$JS.{READERS_DOMAIN}.API.").replace("*", "$1")


@dataclass(frozen=True, slots=True)
class Permissions:
    """What one role may publish and subscribe, and how long it may answer what it was asked."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers_within_seconds: float = 0.0

    def claims(self) -> dict[str, Any]:
        """The permissions as the fields of a NATS JWT (`template` of a scoped signing key)."""
        claims: dict[str, Any] = {"pub": _side(self.publish), "sub": _side(self.subscribe)}
        if self.answers_within_seconds:
            claims["resp"] = {"max": 1, "ttl": int(self.answers_within_seconds * 1e9)}
        return claims


def _side(subjects: tuple[str, ...]) -> dict[str, list[str]]:
    # An empty allow list means "everything" to the server.
    return {"allow": list(subjects)} if subjects else {"deny": [">"]}


def permissions_of(role: str) -> Permissions:
    """What `role` may do: a service, a system user, `agent` or `reader`. Raises KeyError for another."""
    if role not in ACCOUNT_OF:
        raise KeyError(f"there is no role {role!r} on the bus: one of {', '.join(ACCOUNT_OF)}")
    rules = [rule for rule in RULES if role in rule.who]
    return Permissions(
        publish=_union(role, [rule.publish for rule in rules]),
        subscribe=_union(role, [rule.subscribe for rule in rules]),
        answers_within_seconds=max(rule.answers_within_seconds for rule in rules),
    )


def _union(role: str, patterns: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for group in patterns for p in group for s in _expand(p, role)))


def _expand(pattern: str, role: str) -> list[str]:
    me = _NAME_OF_ROLE.get(role, role)
    mine = [stream_of(role), *([HOST_STREAM] if role == "inventory" else [])]
    sets: dict[str, tuple[str, ...]] = {
        "me": (me,),
        "owner": OWNERS,
        "service": SERVICES,
        "stream": STREAMS,
        "shared": OWNERS_STREAMS,
        "mine": tuple(mine),
        "verb": MICRO_VERBS,
    }
    subjects = [pattern]
    for key, values in sets.items():
        if "{" + key + "}" in pattern:
            subjects = [s.replace("{" + key + "}", v) for s in subjects for v in values]
    return subjects


def table() -> str:
    """The rules as a Markdown table, as `docs/architecture/identities.md` shows them."""
    lines = ["| who | why | publishes | subscribes |", "|---|---|---|---|"]
    for rule in RULES:
        cells = (_group(rule.who), rule.why, _cell(rule.publish), _cell(rule.subscribe))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(subjects: tuple[str, ...]) -> str:
    return ", ".join(f"`{subject}`" for subject in subjects)


def _group(who: tuple[str, ...]) -> str:
    if who == OWNERS:
        return "every owner"
    return ", ".join(who).replace(", ".join(SERVICES), "every program")
