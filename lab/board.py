"""What is wrong with a BMC, and what it says and does because of it. Its transports ask here, and only here.

Only the standard library is imported, since the BMC's processes start without more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol

SLOW_SECONDS = 30.0
"""How long a slow BMC thinks before it does anything: longer than anybody waits for one."""


class Fault(StrEnum):
    NONE = "none"
    """It is as it should be."""
    UNREACHABLE = "unreachable"
    """Its cable is pulled: its address doesn't exist."""
    SAYS_ON = "says-on"
    """It says on for ever, and switches nothing."""
    SAYS_OFF = "says-off"
    """It says off for ever, and switches nothing: a liar."""
    REFUSES = "refuses"
    """It has another password."""
    SWAPPED = "swapped"
    """It is wired to another host: that one's power, that one's identity."""
    SLOW = "slow"
    """It takes SLOW_SECONDS for everything."""


class Chassis(Protocol):
    """A machine as its board sees it."""

    @property
    def uuid(self) -> str:
        """Its DMI UUID."""

    def is_on(self) -> bool: ...

    def power_on(self) -> None:
        """Harmless when it is on."""

    def power_off(self) -> None:
        """The plug is pulled. Harmless when it is off."""


class Board:
    """One BMC. Its fault is in a file, looked at each time it is asked."""

    def __init__(
        self, chassis: Chassis, fault_file: Path, partner: Callable[[], Chassis] | None = None
    ) -> None:
        """`partner`: whose board it is when it was swapped."""
        self._chassis = chassis
        self._fault_file = fault_file
        self._partner = partner

    @property
    def fault(self) -> Fault:
        try:
            return Fault(self._fault_file.read_text().strip())
        except FileNotFoundError:
            return Fault.NONE

    @property
    def uuid(self) -> str:
        return self._wired().uuid

    def _wired(self) -> Chassis:
        return self._partner() if self.fault is Fault.SWAPPED and self._partner else self._chassis

    def says_on(self) -> bool:
        """The power as it says it is."""
        fault = self.fault
        if fault is Fault.SLOW:
            time.sleep(SLOW_SECONDS)
        if fault in (Fault.SAYS_ON, Fault.SAYS_OFF):
            return fault is Fault.SAYS_ON
        return self._wired().is_on()

    def switch(self, *, on: bool) -> None:
        fault = self.fault
        if fault is Fault.SLOW:
            time.sleep(SLOW_SECONDS)
        if fault in (Fault.SAYS_ON, Fault.SAYS_OFF):
            return
        if on:
            self._wired().power_on()
        else:
            self._wired().power_off()
