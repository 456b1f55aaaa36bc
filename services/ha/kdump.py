"""Hearing crash kernels: every replica of ha takes `fence_kdump_send`'s messages, from addresses that an administrator named."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from msgspec.structs import replace

from services.ha.policies.kdump import Ignored, Source, address_of, fault_of, heard
from services.ha.state import Ha
from services.ha.store import POWER, PowerPrivate
from volery.contracts.power import KdumpListener, PowerManagement
from volery.runtime.clock import monotonic
from volery.runtime.database import AWAY
from volery.runtime.tables import Change, Row
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How soon another address, or another word about its network, counts on every replica."""


class _Ear(asyncio.DatagramProtocol):
    def __init__(self, ha: Ha) -> None:
        self.ha = ha

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        hear(self.ha, data, address_of(addr[0]))


@asynccontextmanager
async def listening(ha: Ha) -> AsyncIterator[None]:
    """A port that is taken stops nothing else that ha does: it is said, and tried again."""
    if not ha.config.kdump_port:
        yield
        return
    await learn(ha)
    following = asyncio.create_task(_follow(ha))
    try:
        yield
    finally:
        await end([following])


def open_socket(port: int) -> socket.socket:
    """Of both families where there is IPv6."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family is socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.setblocking(False)
        made.bind(("::" if family is socket.AF_INET6 else "", port))
    except OSError as error:
        made.close()
        raise OSError(
            error.errno, f"UDP port {port} for crash kernels (VOLERY_HA_KDUMP_PORT): {error.strerror}"
        ) from error
    return made


async def _follow(ha: Ha) -> None:
    transport: asyncio.BaseTransport | None = None
    try:
        while True:
            transport = transport or await _open(ha)
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await learn(ha)
            except AWAY:
                log.warning("which addresses crash kernels send from can't be read; those known so far count")
    finally:
        if transport is not None:
            transport.close()


async def _open(ha: Ha) -> asyncio.BaseTransport | None:
    port = ha.config.kdump_port
    try:
        made = open_socket(port)
    except OSError as error:
        if ha.dumps.problem != error.strerror:
            log.error("no crash kernel is heard, and power waits for no dump: %s", error.strerror)
        ha.dumps.problem = str(error.strerror)
        return None
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Ear(ha), sock=made)
    ha.dumps.problem = ""
    log.info("crash kernels of hosts are heard on UDP port %d", port)
    return transport


async def learn(ha: Ha) -> None:
    """Whose messages come from where. An address that two hosts name is nobody's."""
    found: dict[str, Source | None] = {}
    for row in await POWER.where(ha.core.pool, "enabled"):
        for address in row.public.kdump_addresses:
            source = Source(row.id, row.public.kdump_proves)
            found[address] = None if address in found else source
    ha.dumps.sources = found


async def taken(ha: Ha, host_id: str) -> dict[str, str]:
    """Addresses of other hosts, with the host's name."""
    rows = [row.public for row in await POWER.where(ha.core.pool) if row.id != host_id]
    return {address: row.host_name for row in rows for address in row.kdump_addresses}


def hear(ha: Ha, data: bytes, address: str) -> None:
    """One message, or what was sent to this port instead."""
    dumps = ha.dumps
    fault = fault_of(data)
    if fault is None and address not in dumps.sources:
        fault = Ignored.STRANGER
    source = dumps.sources.get(address)
    if fault is None and source is None:
        fault = Ignored.SHARED
    if fault is not None or source is None:
        fault = fault or Ignored.SHARED
        dumps.ignored[fault] += 1
        dumps.last_ignored = f"from {address}: {fault}"
        return
    dumps.heard += 1
    watch = ha.watch(source.host_id)
    before, now = watch.dump, monotonic()
    watch.dump = heard(before, now, address, source, watch.last_sign(ha.listening_since), ha.config)
    if before is None or watch.dump.first_at != before.first_at:
        name = watch.facts.name or source.host_id
        log.warning("host %s: a crash kernel at its address %s says that it writes a dump", name, address)


def listener(ha: Ha) -> KdumpListener | None:
    """For `GET /fencing`."""
    if not ha.config.kdump_port:
        return None
    dumps = ha.dumps
    ignored = {str(why): count for why, count in sorted(dumps.ignored.items())}
    return KdumpListener(
        port=ha.config.kdump_port,
        heard=dumps.heard,
        ignored=ignored,
        last_ignored=dumps.last_ignored,
        problem=dumps.problem,
    )


def lied(row: Row[PowerManagement, PowerPrivate]) -> Change:
    """A dump was told of while the host lived: whoever told it can send by that network, and nothing is proven by it until
    a person has looked."""
    words = "a dump was told of while the host showed signs of life: its network is open, kdump proves nothing now"
    return POWER.update(row, replace(row.public, kdump_proves=False, test_words=words))
