"""What a running dwh holds: the minutes that are being gathered."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from nats.aio.msg import Msg

from services.dwh import store
from services.dwh.config import DwhConfig
from services.dwh.sampler import Sampler
from volery.contracts.metrics import METRICS_SUBJECT, HostSample
from volery.runtime.clock import utc_now
from volery.runtime.connection import settle
from volery.runtime.core import Core

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Dwh:
    core: Core
    sampler: Sampler = field(default_factory=Sampler)
    partitions: set[str] = field(default_factory=set)
    """Known to exist."""
    _samples: msgspec.json.Decoder[HostSample] = field(
        default_factory=lambda: msgspec.json.Decoder(HostSample)
    )

    @property
    def config(self) -> DwhConfig:
        config: DwhConfig = self.core.config
        return config

    async def hear(self, message: Msg) -> None:
        """Every replica gathers: whoever leads next has the minutes that the last one didn't write."""
        try:
            sample = self._samples.decode(message.data)
        except msgspec.DecodeError:
            return
        if message.subject == METRICS_SUBJECT.format(host_id=sample.host_id):
            self.sampler.hear(sample, utc_now())


@asynccontextmanager
async def open_dwh(core: Core) -> AsyncIterator[Dwh]:
    dwh = Dwh(core)
    try:
        await store.make_views(core.pool)
    except store.LOST as error:
        # Reports go without them; history is kept all the same.
        log.error("the views for reports can't be made: %s", error)
    await core.bus.client.subscribe(METRICS_SUBJECT.format(host_id="*"), cb=dwh.hear)
    await settle(core.bus.client)
    yield dwh
