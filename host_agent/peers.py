"""Tries other hosts of the cluster for ha: whether their programs answer. Changes nothing, here or there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from host_agent.fencing import OWNER
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.peers import Door, DoorTried, HostTried, Reach, Speaks, TryHost
from volery.runtime.signing import Verifier

log = logging.getLogger(__name__)

AT_ONCE: Final = 8
MOST_DOORS: Final = 4
CONNECT_SECONDS: Final = 2.0
WORD_SECONDS: Final = 2.0
LIBVIRT_QUESTION: Final = bytes.fromhex("0000001c 20008086 00000001 00000042 00000000 00000000 00000000")
"""Which logins do you know (REMOTE_PROC_AUTH_LIST)? The first thing that libvirt's clients ask, and asked of anybody."""

Knock = Callable[[Door], Awaitable[DoorTried]]

_question = msgspec.json.Decoder(TryHost)


class Trier:
    """This host as one that tries others. `hear` answers once every door was tried."""

    def __init__(self, host_id: str, verifier: Verifier, knock: Knock) -> None:
        self._host_id = host_id
        self._verifier = verifier
        self._knock = knock
        self._running = 0

    def trust(self, verifier: Verifier) -> None:
        """Whose questions are heard from now on: ha's key may be renewed."""
        self._verifier = verifier

    async def hear(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> HostTried:
        """Raises Refused when nothing was tried."""
        try:
            ask = _question.decode(payload)
        except msgspec.DecodeError as error:
            raise invalid(f"this is no question about another host: {error}") from None
        self._check(ask, subject, payload, (headers or {}).get(SIGNATURE_HEADER, ""))
        self._running += 1
        try:
            found = await asyncio.gather(*(self._knock(door) for door in ask.doors))
        finally:
            self._running -= 1
        return HostTried(host_id=self._host_id, target_host_id=ask.target_host_id, doors=tuple(found))

    def _check(self, ask: TryHost, subject: str, payload: bytes, signature: str) -> None:
        what = f"trying host {ask.target_host_id}"
        if self._verifier.owner_of(subject, payload, signature) != OWNER:
            raise Refused(
                Kind.FORBIDDEN, f"{what} is not signed by {OWNER} as this host knows it: nothing was tried"
            )
        if ask.host_id != self._host_id:
            raise invalid(f"{what} is asked of another host, {ask.host_id}")
        if ask.target_host_id == self._host_id:
            raise conflict(f"{what} was asked of that host itself: ask another", rule="self")
        if not 1 <= len(ask.doors) <= MOST_DOORS:
            raise invalid(f"{what}: 1 to {MOST_DOORS} doors are tried, not {len(ask.doors)}")
        for door in ask.doors:
            place(door)
        if self._running >= AT_ONCE:
            raise Refused(
                Kind.EXHAUSTED,
                f"{what}: this host tries {AT_ONCE} others already; ask another, or again later",
            )


def place(door: Door) -> tuple[str, int]:
    """Host and port. Raises Refused(invalid)."""
    host, _, port = door.address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not host.isprintable() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise invalid(f"{door.name} is at {door.address[:80]!r}, which is no HOST:PORT")
    return host, int(port)


async def knock(door: Door, word_seconds: float = WORD_SECONDS) -> DoorTried:
    """Connects, CONNECT_SECONDS at most, and waits for a word."""
    host, port = place(door)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return DoorTried(name=door.name, reach=Reach.TAKEN, words="refuses connections")
    except TimeoutError:
        return DoorTried(name=door.name, reach=Reach.NOTHING, words=f"no connection in {CONNECT_SECONDS:g} s")
    except OSError as error:
        return DoorTried(name=door.name, reach=Reach.NOTHING, words=error.strerror or str(error))
    try:
        if writer.get_extra_info("peername")[0] == writer.get_extra_info("sockname")[0]:
            return DoorTried(
                name=door.name, reach=Reach.NOTHING, words="its address is one of the host that tried it"
            )
        return await _word(door, word_seconds, reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(WORD_SECONDS):
                await writer.wait_closed()


async def _word(
    door: Door, seconds: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> DoorTried:
    try:
        async with asyncio.timeout(seconds):
            spoke = await _SAYINGS[door.speaks](reader, writer)
    except ssl.SSLError:
        # Whoever refuses our hello has read it.
        spoke = True
    except (OSError, TimeoutError):
        spoke = False
    if spoke:
        return DoorTried(name=door.name, reach=Reach.ANSWERS, words="answers")
    return DoorTried(name=door.name, reach=Reach.TAKEN, words="takes connections and says nothing")


async def _hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whose certificate it is doesn't matter: nothing is told, and nothing is proven."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    await writer.start_tls(context)
    return True


async def _logins(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(LIBVIRT_QUESTION)
    return bool(await reader.read(4))


async def _banner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    return bool(await reader.read(4))


_SAYINGS: dict[Speaks, Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]] = {
    Speaks.TLS: _hello,
    Speaks.LIBVIRT: _logins,
    Speaks.SSH: _banner,
}
