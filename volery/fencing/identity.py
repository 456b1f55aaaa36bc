"""Which machine a BMC belongs to: what keeps a mistyped address from switching off somebody else's host."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer
from volery.fencing import process, rules
from volery.fencing.ipmi import GUID, ask_guid
from volery.fencing.metadata import FALSE, SYSTEMS_URI, AgentInfo

REDFISH = str(Path(__file__).with_name("redfish.py"))
_HEX = re.compile(r"[0-9a-f]{32}")
_NOBODYS = frozenset({"0" * 32, "f" * 32, "03000200040005000006000700080009"})
"""What boards say whose maker wrote no number of their own."""


class _Said(msgspec.Struct):
    uuid: str = ""
    problem: str = ""


def same_machine(said: str, dmi_uuid: str) -> bool:
    """Whether a BMC's UUID is that of the machine with this DMI UUID, in any order in which firmwares write its bytes.

    RFC 4122 writes it as it is shown, SMBIOS turns the first three fields around, IPMI all sixteen bytes.
    """
    theirs, ours = normal(said), normal(dmi_uuid)
    return bool(theirs and ours) and ours in _spellings(theirs)


def _spellings(text: str) -> set[str]:
    """What the firmware's order, and then that of the program which shows it, can have made of these bytes."""
    plain = bytes.fromhex(text)
    found = {plain, plain[::-1], _swapped(plain), _swapped(plain[::-1]), _swapped(plain)[::-1]}
    return {one.hex() for one in found}


def _swapped(sixteen: bytes) -> bytes:
    return uuid.UUID(bytes_le=sixteen).bytes


def normal(text: str) -> str:
    """The 32 digits of a UUID; "" for what isn't one, or is one that many machines share."""
    digits = text.strip().lower().replace("-", "")
    return digits if _HEX.fullmatch(digits) and digits not in _NOBODYS else ""


async def ask(agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str], ask_id: str) -> PowerAnswer:
    """`identity` as the device says it, dashed and lower case; empty, with the reason in `words`, when it can't."""
    if agent.runs_ipmitool:
        ended = await ask_guid(agent, device, secrets)
        match = GUID.search(ended.output)
        found, words = (match.group(1) if match else ""), ended.output + "\n" + ended.errors
    elif SYSTEMS_URI in agent.parameters:
        ended = await _ask_redfish(agent, device, secrets)
        said = _read(ended.output)
        found, words = said.uuid, said.problem or ended.errors
    else:
        return PowerAnswer(
            ask_id=ask_id,
            action=PowerAction.IDENTITY,
            words=f"{agent.name} can't say which machine it switches",
        )
    digits = normal(found)
    hide = rules.forms_of(device, secrets)
    if ended.exit_code is None:
        words = f"the BMC did not answer within {device.timeout_seconds:g} s"
    elif not digits and found:
        words = f"the BMC says {found}, which is no machine's own UUID"
    elif not digits and not words.strip():
        words = "the BMC names no UUID"
    return PowerAnswer(
        ask_id=ask_id,
        action=PowerAction.IDENTITY,
        identity=str(uuid.UUID(digits)) if digits else "",
        words=rules.last_words(words, hide),
        exit_code=-1 if ended.exit_code is None else ended.exit_code,
    )


async def _ask_redfish(agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str]) -> process.Ended:
    insecure = device.options.get("ssl_insecure", "0").lower() not in FALSE
    question = {
        "address": device.address,
        "port": str(device.port),
        "username": device.username,
        "password": secrets.get("password", ""),
        "insecure": "1" if insecure else "",
        "seconds": str(device.timeout_seconds),
        "systems_uri": device.options.get(SYSTEMS_URI, ""),
        "redfish_uri": device.options.get("redfish_uri") or agent.parameters["redfish_uri"].default,
    }
    return await process.run(
        [sys.executable, "-S", "-E", REDFISH],
        stdin=msgspec.json.encode(question),
        timeout_seconds=device.timeout_seconds,
    )


def _read(output: str) -> _Said:
    try:
        return msgspec.json.decode(output.strip() or "{}", type=_Said)
    except msgspec.DecodeError:
        return _Said(problem="the BMC's answer could not be read")
