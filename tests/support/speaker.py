"""An owner that says what a test tells it, through the real log, relay and stream, and lists what it said."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from volery.contracts.base import Call, Entity, Fact, Owner, encode
from volery.contracts.operation import ListQuery, Page
from volery.runtime.bus import Caller
from volery.runtime.core import Core
from volery.runtime.service import Part, Service
from volery.runtime.tables import Change, commit, say


class NoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


@dataclass
class Speaker:
    """`service` goes into `running(...)`; then `await speaker.says(VM_CHANGED, vm)`."""

    owner: Owner
    lists: Sequence[tuple[Call[ListQuery, Page], type[Entity]]] = ()
    answers: Sequence[tuple[Call[Any, Any], Any]] = ()
    """(call, async (speaker, question, caller) → answer)"""
    runs: Sequence[tuple[str, Any]] = ()
    """(kind of operation, async (speaker, run))"""
    objects: dict[str, Entity] = field(default_factory=dict)
    core: Core | None = None

    def service(self) -> Service:
        part = Part()
        for call, type_ in self.lists:
            part.answers(call)(self._lister(type_))
        for call, handler in self.answers:
            part.answers(call)(handler)
        for kind, carried_out in self.runs:
            part.runs(kind, deadline_seconds=60)(carried_out)
        return Service(self.owner, self._open, NoSettings, [part])

    @asynccontextmanager
    async def _open(self, core: Core) -> AsyncIterator[Speaker]:
        self.core = core
        yield self

    def _lister(self, type_: type[Entity]) -> Any:
        async def listed(_: Speaker, query: ListQuery, caller: Caller) -> Page:
            found = [o for i, o in sorted(self.objects.items()) if isinstance(o, type_) and i > query.page]
            more = found[query.limit : query.limit + 1]
            items = found[: query.limit]
            return Page(items=tuple(msgspec.Raw(encode(o)) for o in items), next=items[-1].id if more else "")

        return listed

    def knows(self, *objects: Entity) -> None:
        """Objects that it lists without saying them."""
        self.objects |= {o.id: o for o in objects}

    async def says(self, fact: Fact[Any], *payloads: Entity) -> None:
        assert self.core is not None
        told = tuple(say(fact, payload) for payload in payloads)
        await commit(self.core.pool, [Change("select 1 as n", (), told)])
        for payload in payloads:
            if fact.name.endswith(".deleted"):
                self.objects.pop(payload.id, None)
            else:
                self.objects[payload.id] = payload
        self.core.relay_wake.set()
