"""What would reset this host if it stopped renewing its leases: wdmd, and the device that it pets."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from volery.contracts.leases import WATCHDOG_FIRE_SECONDS, Watchdog
from volery.runtime.clock import monotonic

WDMD_SOCKET = "/run/wdmd/wdmd.sock"
ASK_SECONDS = 5.0
STATUS = 5
HEADER = struct.Struct("=6I3Q128s")
"""wdmd_sock.h: magic, cmd, len, flags, test_interval, fire_timeout; last_keepalive, renewal_time, expire_time; name."""
LATE_TESTS = 3
"""So many of its test intervals without a pet, and wdmd has failed or is letting the watchdog fire."""
SOFTWARE = ("software watchdog", "softdog")


@dataclass(frozen=True, slots=True)
class Wdmd:
    """What wdmd says of itself. Times are seconds, the last pet by CLOCK_MONOTONIC."""

    test_interval: int
    fire_seconds: int
    last_pet: int


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    identity: str
    active: bool


async def look(class_path: str, sanlock_uses_it: bool, wdmd_socket: str = WDMD_SOCKET) -> Watchdog:
    """As it is now."""
    wdmd = await ask_wdmd(wdmd_socket)
    return judged(sanlock_uses_it, wdmd, devices(Path(class_path)), monotonic())


async def ask_wdmd(socket_path: str = WDMD_SOCKET) -> Wdmd | None:
    """None when it isn't there or doesn't answer."""
    try:
        async with asyncio.timeout(ASK_SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            try:
                writer.write(HEADER.pack(0, STATUS, 0, 0, 0, 0, 0, 0, 0, b""))
                values = HEADER.unpack(await reader.readexactly(HEADER.size))
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None
    return Wdmd(test_interval=values[4], fire_seconds=values[5], last_pet=values[6])


def devices(class_path: Path) -> tuple[Device, ...]:
    """The watchdog devices that the kernel tells of."""
    found = []
    for entry in sorted(class_path.glob("watchdog[0-9]*")):
        texts = {}
        for name in ("identity", "state"):
            with contextlib.suppress(OSError):
                texts[name] = (entry / name).read_text().strip()
        found.append(Device(entry.name, texts.get("identity", ""), texts.get("state") == "active"))
    return tuple(found)


def judged(sanlock_uses_it: bool, wdmd: Wdmd | None, found: Sequence[Device], now: float) -> Watchdog:
    """Whether the host can outlive its watchdog. Pure; `now` is the host's CLOCK_MONOTONIC."""
    active = next((device for device in found if device.active), None)
    if wdmd is None:
        return Watchdog(
            problem="wdmd doesn't run on this host: load the machine's watchdog driver, then enable and start wdmd"
        )
    identity = active.identity if active is not None else ""
    watchdog = Watchdog(identity=identity, fire_seconds=wdmd.fire_seconds)
    if problem := _not_armed(sanlock_uses_it, wdmd, now):
        return _with(watchdog, problem=problem)
    if active is None:
        problem = "wdmd pets a device that the kernel doesn't show as active: look at /sys/class/watchdog"
    elif identity.lower().startswith(SOFTWARE):
        problem = (
            f"{active.name} is the kernel's own ({identity}), and a kernel that is stuck can't reset itself: load the"
            " machine's watchdog driver (iTCO_wdt, ipmi_watchdog, sp5100_tco, i6300esb, …) instead of softdog"
        )
    else:
        return _with(watchdog, armed=True, inescapable=True)
    return _with(watchdog, armed=True, problem=problem)


def _not_armed(sanlock_uses_it: bool, wdmd: Wdmd, now: float) -> str:
    if not sanlock_uses_it:
        return "sanlock runs without its watchdog: remove `-w 0` from its options (/etc/default/sanlock) and restart it"
    if wdmd.fire_seconds != WATCHDOG_FIRE_SECONDS:
        return f"the watchdog fires after {wdmd.fire_seconds} s, and sanlock needs {WATCHDOG_FIRE_SECONDS} s"
    if now - wdmd.last_pet > LATE_TESTS * wdmd.test_interval:
        return f"wdmd has not petted the watchdog for {now - wdmd.last_pet:.0f} s: this host is about to be reset"
    return ""


def _with(
    watchdog: Watchdog, *, armed: bool = False, inescapable: bool = False, problem: str = ""
) -> Watchdog:
    return Watchdog(
        armed=armed,
        inescapable=inescapable,
        identity=watchdog.identity,
        fire_seconds=watchdog.fire_seconds,
        problem=problem,
    )
