"""A domain's serial console as an asyncio reader and writer, on a libvirt connection of its own.

Its own connection, so that a reader who is slow or gone holds up nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

READABLE, WRITABLE, ERROR, HANGUP = 1, 2, 4, 8
"""virStreamEventType; their numbers never change."""
CHUNK_BYTES = 64 * 1024
BUFFER_BYTES = 1024 * 1024
"""What is kept for a reader who lags; beyond it the guest's output waits in libvirtd."""
WOULD_BLOCK = -2


class ConsoleStream:
    """`read` returns b"" when the console has ended. Made by `Hypervisor.open_console`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: Any,
        close: Callable[[], None],
        error: type[Exception],
    ) -> None:
        self._loop = loop
        self._stream = stream
        self._close = close
        self._error = error
        self._output = bytearray()
        self._input = bytearray()
        self._ended = False
        self._changed = asyncio.Event()
        self._events = READABLE | ERROR | HANGUP

    def listen(self) -> None:
        """In a thread: from now on libvirt's event thread tells when there is something to do."""
        self._stream.eventAddCallback(self._events, self._happened, None)

    async def read(self) -> bytes:
        """The next bytes from the guest, as soon as there are some; b"" at the end."""
        while not self._output and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        data = bytes(self._output)
        self._output.clear()
        self._watch()
        return data

    async def write(self, data: bytes) -> None:
        """Bytes to the guest. Returns when libvirt has taken them; raises ConnectionError at the end."""
        self._input += data
        self._flush()
        while self._input and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._ended:
            raise ConnectionError(
                "the console has ended: the VM stopped, or somebody else opened its console"
            )

    async def close(self) -> None:
        self._end()

    def _happened(self, _stream: Any, events: int, _opaque: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._handle, events)

    def _handle(self, events: int) -> None:
        if self._ended:
            return
        if events & READABLE:
            self._drain()
        if events & WRITABLE:
            self._flush()
        if events & (ERROR | HANGUP):
            self._drain()
            self._end()

    def _drain(self) -> None:
        """Take what libvirt has received already: never waits."""
        while not self._ended and len(self._output) < BUFFER_BYTES:
            try:
                data = self._stream.recv(CHUNK_BYTES)
            except self._error:
                data = b""
            if data == WOULD_BLOCK:
                break
            if not data:
                self._end()
                return
            self._output += data
        self._watch()
        self._changed.set()

    def _flush(self) -> None:
        """Hand over what libvirt takes at once."""
        while self._input and not self._ended:
            try:
                sent = self._stream.send(bytes(self._input[:CHUNK_BYTES]))
            except self._error:
                self._end()
                return
            if sent == WOULD_BLOCK:
                break
            del self._input[:sent]
        self._watch()
        self._changed.set()

    def _watch(self) -> None:
        events = ERROR | HANGUP
        if len(self._output) < BUFFER_BYTES:
            events |= READABLE
        if self._input:
            events |= WRITABLE
        if events != self._events and not self._ended:
            self._events = events
            self._stream.eventUpdateCallback(events)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._close()
        self._changed.set()
