"""One libvirt connection and the threads that call on it; a connection with a stuck call is replaced.

libvirtd serves five requests per client: a lane that kept its connection would fill it with stuck calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from host_agent.threads import Stuck, Threads, nothing

T = TypeVar("T")


class Opener(Protocol):
    """How a lane gets, checks and drops connections: libvirt, as the hypervisor module sees it."""

    def open(self) -> Any: ...
    def is_alive(self, connection: Any) -> bool: ...
    def close(self, connection: Any) -> None: ...


class Lane:
    """`call(work)` runs `work(connection)` in one of `size` threads.

    The connection is opened by the first call that needs it, inside that call's deadline; so a link that is cut
    can't hang anybody.
    """

    def __init__(self, name: str, size: int, opener: Opener, stuck: Stuck) -> None:
        self.name = name
        self._opener = opener
        self._threads = Threads(name, size, stuck)
        self._connection: Any = None
        self._opening = threading.Lock()
        self._users: dict[int, int] = {}
        self._guard = threading.Lock()

    async def call(
        self,
        work: Callable[[Any], T],
        seconds: float,
        abandoned: Callable[[], None] = nothing,
        returned: Callable[[], None] = nothing,
    ) -> T:
        """Raises CallAbandoned after `seconds`, and what `work` or opening the connection raises."""
        used: list[Any] = []

        def run() -> T:
            connection = self._take()
            used.append(connection)
            try:
                return work(connection)
            finally:
                self._give_back(connection)

        def replace() -> None:
            self._replace(used[0] if used else None)
            abandoned()

        return await self._threads.call(run, seconds, replace, returned)

    def close(self) -> None:
        """Drop the connection, or leave it to the calls that still use it."""
        self._threads.close()
        self._replace(self._connection)

    def _take(self) -> Any:
        opening = self._opening
        with opening:
            connection = self._connection
            if connection is None or not self._opener.is_alive(connection):
                connection = self._opener.open()
                with self._guard:
                    if self._opening is opening:
                        self._connection = connection
        with self._guard:
            self._users[id(connection)] = self._users.get(id(connection), 0) + 1
        return connection

    def _give_back(self, connection: Any) -> None:
        with self._guard:
            self._users[id(connection)] -= 1
            unused = not self._users[id(connection)] and connection is not self._connection
            if unused or not self._users[id(connection)]:
                del self._users[id(connection)]
        if unused:
            self._opener.close(connection)

    def _replace(self, connection: Any) -> None:
        """The next call opens a new connection; the old one closes when its last call has returned."""
        with self._guard:
            if connection is None:
                self._opening = threading.Lock()  # its holder hangs in opening: don't wait behind it
            if connection is not self._connection:
                return
            self._connection = None
            unused = connection is not None and id(connection) not in self._users
        if unused:
            self._opener.close(connection)
