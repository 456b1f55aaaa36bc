"""How ha opens: what it listens to, and the connection on which it asks hosts to switch others' power."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from nats.aio.client import Client

from services.ha import kdump, listening
from services.ha.config import HaConfig
from services.ha.state import Ha
from volery.runtime.connection import settle
from volery.runtime.core import Core
from volery.runtime.signing import Signer, parse_creds
from volery.runtime.tasks import end
from volery.runtime.vault import open_vault

log = logging.getLogger(__name__)

CONNECTIONS = ("$SYS.ACCOUNT.*.CONNECT", "$SYS.ACCOUNT.*.DISCONNECT")


@asynccontextmanager
async def open_ha(core: Core) -> AsyncIterator[Ha]:
    config: HaConfig = core.config
    async with AsyncExitStack() as stack:
        orders = await core.outside.connect(core.bus_config, str(core.owner), never_queue=True)
        stack.push_async_callback(orders.close)
        ha = Ha(core, open_vault(config.key_file, "VOLERY_HA_KEY_FILE"), orders, _signer(core))
        core.beats.listeners.append(ha.hear_beat)
        await core.beats.listen(core.bus.client)
        await settle(core.bus.client)
        system = await _watch_connections(ha)
        if system is not None:
            stack.push_async_callback(system.close)
        listening.anew(ha)
        following = asyncio.create_task(listening.follow(ha))
        stack.push_async_callback(end, [following])
        await stack.enter_async_context(kdump.listening(ha))
        yield ha


def _signer(core: Core) -> Callable[[str, bytes], str]:
    directory = core.bus_config.credentials_dir
    if not directory:
        return lambda subject, payload: ""
    _, key = parse_creds(Path(directory, f"{core.owner}.creds").read_text())
    return Signer(key.seed).sign


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
