"""Who asks: bearers become principals by inventory's word, believed for seconds and forgotten at its facts.

Scopes: read < write < admin, each includes those before it. `write` is everything but accounts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from api_gateway.exchange import Exchange
from volery.contracts.account import CHECK_TOKEN, CheckToken, Principal, Scope
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import is_id
from volery.runtime.bus import Bus

RANK = {Scope.READ: 1, Scope.WRITE: 2, Scope.ADMIN: 3}
MAX_KNOWN = 10_000
MAX_BEARER = 512


def unauthenticated(message: str) -> Refused:
    return Refused(Kind.UNAUTHENTICATED, message)


@dataclass(frozen=True, slots=True)
class Known:
    principal: Principal
    checked_at: float
    expires_at: float


@dataclass(slots=True)
class Door:
    """Checks bearers. Remembers them by their hash, never by their text."""

    bus: Bus
    remember_seconds: float
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    known: dict[bytes, Known] = field(default_factory=dict)
    epoch: int = 0
    """Counts evictions: a check that was on its way meanwhile isn't remembered."""
    on_evicted: list[Callable[[Callable[[Principal], bool]], None]] = field(default_factory=list)

    async def admit(self, http: Exchange, scope: Scope) -> Principal:
        """Raises Refused(unauthenticated, forbidden)."""
        authorization = http.header(b"authorization")
        if authorization is None:
            raise unauthenticated(
                "this needs a token: POST /api/v1/sessions with name and password gives one, then send "
                "`Authorization: Bearer vol_…`"
            )
        method, _, bearer = authorization.partition(" ")
        if method.lower() != "bearer" or not bearer:
            raise unauthenticated("Authorization must be `Bearer` and a token")
        principal = await self.principal(bearer.strip())
        http.principal = principal
        allow(principal, scope)
        return principal

    async def principal(self, bearer: str) -> Principal:
        """Raises Refused(unauthenticated)."""
        digest = hashlib.sha256(bearer.encode("utf-8", "surrogateescape")).digest()
        found = self.known.get(digest)
        if found is not None and self.clock() - found.checked_at < self.remember_seconds:
            if found.expires_at <= self.now():
                raise _expired()
            return found.principal
        return await self._check(bearer, digest)

    async def _check(self, bearer: str, digest: bytes) -> Principal:
        token_id, secret = _parts(bearer)
        epoch = self.epoch
        question = CheckToken(token_id=token_id, secret_sha256=hashlib.sha256(secret.encode()).hexdigest())
        try:
            principal = await self.bus.ask(CHECK_TOKEN, question)
        except Refused as refused:
            if refused.kind in (Kind.NOT_FOUND, Kind.FORBIDDEN, Kind.INVALID):
                raise unauthenticated(
                    "the token is not known: it was deleted or mistyped; log in again"
                ) from None
            raise
        if principal.expires_at <= datetime.fromtimestamp(self.now(), UTC):
            raise _expired()
        if epoch == self.epoch:
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[digest] = Known(principal, self.clock(), principal.expires_at.timestamp())
        return principal

    def evict(self, matches: Callable[[Principal], bool]) -> None:
        """Forget principals that a fact was about; open streams of theirs end."""
        self.epoch += 1
        for digest in [d for d, known in self.known.items() if matches(known.principal)]:
            del self.known[digest]
        for tell in self.on_evicted:
            tell(matches)

    def heard(self, noun: str, object_id: str) -> None:
        """A fact about a token or a user, by the tokens of its subject."""
        if noun == "token":
            self.evict(lambda p: p.token_id == object_id)
        elif noun == "user":
            self.evict(lambda p: p.principal == f"user:{object_id}")


def _parts(bearer: str) -> tuple[str, str]:
    """`vol_{token_id}_{secret}`"""
    prefix, _, rest = bearer.partition("_")
    token_id, _, secret = rest.partition("_")
    if (
        prefix != "vol"
        or not secret
        or not is_id(token_id)
        or len(bearer) > MAX_BEARER
        or not secret.isascii()
    ):
        raise unauthenticated("this is not a token of Volery: they begin with vol_; log in to get one")
    return token_id, secret


def _expired() -> Refused:
    return unauthenticated("the token has expired; log in again")


def rank(principal: Principal) -> int:
    return max((RANK[scope] for scope in principal.scopes), default=0)


def allow(principal: Principal, scope: Scope) -> None:
    """Raises Refused(forbidden) when none of the token's scopes is enough."""
    if rank(principal) < RANK[scope]:
        raise Refused(
            Kind.FORBIDDEN,
            f"this token may not do this: it needs the scope {scope.value}, and has "
            f"{', '.join(s.value for s in principal.scopes) or 'none'}; log in again asking for {scope.value}",
            needed=scope.value,
        )


@dataclass(slots=True)
class Attempts:
    """Counts attempts per key in a sliding minute, in bounded memory."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    seen: dict[str, list[float]] = field(default_factory=dict)

    def take(self, *keys: str) -> None:
        """Raises Refused(rate_limited) when one key has had its share."""
        now = self.clock()
        if len(self.seen) > MAX_KNOWN:
            self.seen = {k: times for k, times in self.seen.items() if times[-1] > now - 60}
        for key in keys:
            times = [t for t in self.seen.get(key, ()) if t > now - 60]
            if len(times) >= self.per_minute:
                self.seen[key] = times
                raise Refused(
                    Kind.RATE_LIMITED,
                    f"too many attempts: {self.per_minute} a minute are allowed; wait and try again",
                    retry_after_seconds=int(times[0] + 60 - now) + 1,
                )
            self.seen[key] = [*times, now]
