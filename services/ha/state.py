"""What a running ha holds in memory: what it heard of each host, and since when it has been listening."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.ha.config import HaConfig
from services.ha.policies.evidence import UNKNOWN, Seen
from volery.contracts.liveness import LivenessState
from volery.contracts.metrics import BEAT_SUBJECT, Beat
from volery.runtime.clock import monotonic
from volery.runtime.connection import read_presence, settle
from volery.runtime.core import Core

log = logging.getLogger(__name__)

CONNECTIONS = ("$SYS.ACCOUNT.*.CONNECT", "$SYS.ACCOUNT.*.DISCONNECT")


@dataclass(slots=True)
class Watch:
    """One host as it was heard; times on the monotonic clock."""

    known: bool = False
    """Whether it is a host of inventory's; others are heard, but not judged."""
    state: LivenessState = UNKNOWN
    generation: str = ""
    """The journal that inventory admitted; "" is any."""
    boot_id: str = ""
    beat: Beat | None = None
    beat_at: float | None = None
    stranger_beat_at: float | None = None
    connected_at: float | None = None
    disconnected_at: float | None = None
    disconnect_reason: str = ""

    def seen(self) -> Seen:
        return Seen(self.state, self.beat_at, self.stranger_beat_at, self.disconnected_at)

    def hear(self, beat: Beat, now: float) -> None:
        """A beat that doesn't come after the last one of its journal is a late copy, no sign of life."""
        if self.generation not in ("", beat.generation):
            self.stranger_beat_at = now
            return
        last = self.beat
        if last is not None and last.generation == beat.generation and beat.beat_seq <= last.beat_seq:
            return
        self.beat, self.beat_at = beat, now
        self.stranger_beat_at = None


@dataclass(slots=True)
class Ha:
    core: Core
    clock: Callable[[], float] = monotonic
    watches: dict[str, Watch] = field(default_factory=dict)
    listening_since: float = 0.0
    ticked_at: float = 0.0
    reconnects: int = -1
    storm_since: float | None = None
    listed: bool = False
    """Whether inventory was listed since this process leads."""

    @property
    def config(self) -> HaConfig:
        config: HaConfig = self.core.config
        return config

    def watch(self, host_id: str) -> Watch:
        found = self.watches.get(host_id)
        if found is None:
            found = self.watches[host_id] = Watch()
        return found

    def hear_beat(self, beat: Beat, now: float) -> None:
        self.watch(beat.host_id).hear(beat, now)

    async def hear_presence(self, message: Msg) -> None:
        """The NATS server's word that a user came or went. Never log the message: it carries the user's token."""
        try:
            presence = read_presence(message.data)
        except ValueError:
            return
        watch = self.watches.get(presence.name)
        if watch is None:
            return
        if message.subject.endswith(".DISCONNECT"):
            watch.disconnected_at, watch.disconnect_reason = self.clock(), presence.reason
        else:
            watch.connected_at, watch.disconnected_at = self.clock(), None


@asynccontextmanager
async def open_ha(core: Core) -> AsyncIterator[Ha]:
    ha = Ha(core)
    core.beats.listeners.append(ha.hear_beat)
    await core.bus.client.subscribe(BEAT_SUBJECT.format(host_id="*"), cb=core.beats.hear)
    await settle(core.bus.client)
    system = await _watch_connections(ha)
    try:
        yield ha
    finally:
        if system is not None:
            await system.close()


async def _watch_connections(ha: Ha) -> Client | None:
    """The system account's events; without the credentials for them beats must do."""
    directory = ha.core.bus_config.credentials_dir
    if not directory:
        return None
    if not Path(directory, "sys.creds").exists():
        log.warning("no %s/sys.creds: a host that leaves is noticed by its silence only", directory)
        return None
    system = await ha.core.outside.connect(ha.core.bus_config, "sys")
    for subject in CONNECTIONS:
        await system.subscribe(subject, cb=ha.hear_presence)
    return system


async def can_ask(client: Client, seconds: float) -> bool:
    """Whether the server answers us."""
    try:
        await client.flush(timeout=max(int(seconds), 1))
    except (nats.errors.Error, TimeoutError):
        return False
    return True
