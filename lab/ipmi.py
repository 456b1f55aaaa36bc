"""What OpenIPMI's ipmi_sim must be told to be the BMC of one machine: its configuration, and the program that it asks.

`python -S -m lab.ipmi STATE NAME NUMBER MC get|set …` is that program for a host of a lab.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from lab.board import Board

MANAGEMENT_CONTROLLER = "0x20"
EMULATOR = f"""\
mc_setbmc {MANAGEMENT_CONTROLLER}
mc_add {MANAGEMENT_CONTROLLER} 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr
mc_enable {MANAGEMENT_CONTROLLER}
"""
AUTHENTICATION = "none md2 md5 straight"


def write_configuration(
    directory: Path,
    *,
    address: tuple[str, int],
    login: tuple[str, str],
    machine: str,
    chassis: Sequence[str],
) -> list[str]:
    """The arguments that run ipmi_sim. `machine` is the UUID that it names, `chassis` the program that it asks."""
    directory.mkdir(parents=True, exist_ok=True)
    user, password = login
    program = directory / "chassis.sh"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(chassis)} "$@"\n')
    program.chmod(0o700)
    levels = "\n".join(
        f"  allowed_auths_{level} {AUTHENTICATION}" for level in ("callback", "user", "operator", "admin")
    )
    lan = directory / "lan.conf"
    lan.write_text(
        f"""\
name "bmc"
set_working_mc {MANAGEMENT_CONTROLLER}
startlan 1
  addr {address[0]} {address[1]}
  priv_limit admin
{levels}
  guid {guid_of(machine)}
endlan
chassis_control "{program} {MANAGEMENT_CONTROLLER}"
user 1 false "" "nobody" user 10 {AUTHENTICATION}
user 2 true "{user}" "{password}" admin 10 {AUTHENTICATION}
"""
    )
    lan.chmod(0o600)
    (directory / "sim.emu").write_text(EMULATOR)
    (directory / "state").mkdir(exist_ok=True)
    return [
        *("ipmi_sim", "-n", "-c", str(lan), "-f", str(directory / "sim.emu")),
        *("-s", str(directory / "state")),
    ]


def guid_of(machine: str) -> str:
    """The UUID as IPMI sends it: its sixteen bytes turned around."""
    return uuid.UUID(machine).bytes[::-1].hex()


def answer(board: Board, arguments: Sequence[str]) -> list[str]:
    """What ipmi_sim's chassis program prints for `get NAME…` or `set NAME VALUE…`."""
    verb, *words = arguments
    if verb == "get":
        values = {"power": lambda: int(board.says_on())}
        return [f"{name}:{values[name]() if name in values else 0}" for name in words]
    for name, value in zip(words[::2], words[1::2], strict=False):
        if name == "power":
            board.switch(on=value == "1")
        elif name == "reset":
            board.switch(on=False)
            board.switch(on=True)
    return []


def main(arguments: list[str]) -> int:
    from lab.bmc import Bmc

    state, name, number, _, *asked = arguments
    for line in answer(Bmc.of(Path(state), name, int(number)).board, asked):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
