"""Devices of the fleet's hosts in memory: hosts of a kind, with the same given away, are looked at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.scheduler.policies.devices import NOTHING, Asks, HostState, Part, choose, read_devices
from services.scheduler.policies.devices import Held as DevicesHeld

__all__ = ["Asks", "DevicesHeld", "FleetDevices"]

Key = tuple[str, frozenset[str], tuple[Part, ...]]


@dataclass(slots=True)
class FleetDevices:
    """Only of hosts that have some."""

    texts: dict[str, str] = field(default_factory=dict)
    """Host → its devices as the table has them."""
    _held: dict[str, DevicesHeld] = field(default_factory=dict)
    _hosts: dict[Key, set[str]] = field(default_factory=dict)
    _states: dict[Key, HostState] = field(default_factory=dict)

    def put(self, host_id: str, text: str, held: DevicesHeld) -> None:
        """ "" takes the host's devices away."""
        self.drop(host_id)
        if not text and held == NOTHING:
            return
        self.texts[host_id], self._held[host_id] = text, held
        self._hosts.setdefault(self._key(host_id), set()).add(host_id)

    def drop(self, host_id: str) -> None:
        if host_id not in self.texts:
            return
        key = self._key(host_id)
        self._hosts[key].discard(host_id)
        if not self._hosts[key]:
            del self._hosts[key]
            self._states.pop(key, None)
        del self.texts[host_id], self._held[host_id]

    def _key(self, host_id: str) -> Key:
        held = self._held[host_id]
        return self.texts[host_id], held.whole, held.parts

    def held(self, host_id: str) -> DevicesHeld:
        return self._held.get(host_id, NOTHING)

    def hold(self, host_id: str, held: DevicesHeld) -> None:
        if held is not self.held(host_id):
            self.put(host_id, self.texts.get(host_id, ""), held)

    def state_of(self, host_id: str) -> HostState:
        return self._state(self._key(host_id)) if host_id in self.texts else HostState()

    def _state(self, key: Key) -> HostState:
        if key not in self._states:
            text, whole, parts = key
            self._states[key] = HostState(read_devices(text), whole, parts)
        return self._states[key]

    def having(self, asks: Asks) -> Iterator[str]:
        """Hosts that have all of this for one VM now."""
        for state, hosts in self.kinds():
            if choose(state, asks) is not None:
                yield from hosts

    def kinds(self) -> Iterator[tuple[HostState, set[str]]]:
        """Hosts that have the same, with the same given away."""
        for key, hosts in self._hosts.items():
            yield self._state(key), hosts

    def seat(self, host_id: str, asks: Asks) -> DevicesHeld:
        """A VM takes what it asks for, to see what is left. Returns what was held before."""
        held = self.held(host_id)
        if asks and (given := choose(self.state_of(host_id), asks)) is not None:
            self.hold(host_id, held.with_more(given, "", ""))
        return held

    def part(self, host_ids: list[str]) -> FleetDevices:
        """A copy of some hosts', to try things on."""
        made = FleetDevices()
        for host_id in host_ids:
            if host_id in self.texts:
                made.put(host_id, self.texts[host_id], self._held[host_id])
        return made
