"""What a fence agent may be told, and what its end means. Pure: no process, no clock.

Agents believe what they are told: they run scripts, write files, and take an unknown name for a typing mistake that
they print with its value. So only names of their own metadata reach them, without those that would run or write
something, and secrets go where they belong.
"""

from __future__ import annotations

import base64
import difflib
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping

from volery.contracts.errors import invalid
from volery.contracts.fencing import FenceDevice, PowerAction, PowerState
from volery.fencing.metadata import FALSE, SYSTEMS_URI, TRUE, AgentInfo, Parameter

AGENT_NAME = re.compile(r"fence_[a-z0-9_]{1,40}")
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
"""Also an IPv4 address. It never begins with a dash, which a program would take for an option."""
MAX_VALUE = 1024
MAX_OPTIONS = 32
MIN_SECONDS = 1.0
MAX_SECONDS = 60.0
OWN_WORDS_SECONDS = 4.0
WORDS_LIMIT = 600
WORD_LINES = 4
HIDDEN = "•••"

NOT_POWER: Mapping[str, str] = {
    "fence_ack_manual": "it asks a person and switches nothing",
    "fence_dummy": "it is made for tests and switches nothing",
    "fence_heuristics_ping": "it pings and switches nothing",
    "fence_kdump": "it hears a crashed kernel, which is evidence and no proof",
    "fence_sbd": "it leaves a message for the machine and can't see whether that obeyed",
    "fence_scsi": "it cuts a machine off its storage and leaves its power alone",
    "fence_mpath": "it cuts a machine off its storage and leaves its power alone",
    "fence_compute": "it tells OpenStack and switches nothing",
    "fence_evacuate": "it tells OpenStack and switches nothing",
}
SHOWS_SECRETS: Mapping[str, str] = {
    "fence_amt": "amttool",
    "fence_ironic": "OpenStack's client",
    "fence_vmware": "its helper",
}
"""Agents that put the password into another program's arguments or environment."""

SET_ELSEWHERE: Mapping[str, str] = {
    "action": "Volery sets it for each action",
    "ip": "it is the device's address",
    "ipport": "it is the device's port",
    "username": "it is the device's username",
    "method": "Volery never cycles power: it switches off, confirms it, and only then on",
    "delay": "Volery decides when",
    "quiet": "the device's own words are kept",
    "verbose": "it would print secrets",
    "verbose_level": "it would print secrets",
    "debug_file": "it writes a file on the host that runs the agent",
    "help": "it is no setting",
    "version": "it is no setting",
    "use_sudo": "agents run as whoever runs them",
    "ssh_options": "it can run programs on the host that runs the agent",
    "identity_file": "it reads a file of the host that runs the agent",
    "hexadecimal_kg": "ipmitool takes it only where every user of the host can read it",
}
RUNS_SOMETHING = ("_path", "_script")
_SECRET = re.compile(r"pass(wd|word|phrase)|secret|token|community|(^|_)(api|access|auth|priv)_?key")


def is_secret(name: str) -> bool:
    """Whether a parameter is never shown, by its name."""
    return _SECRET.search(name) is not None


def check(agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str]) -> None:
    """Raises Refused(invalid) with what is wrong with the device and how it must be."""
    check_frame(device)
    if agent.fabric or not {"on", "off", "status"} <= agent.actions:
        raise invalid(
            f"{agent.name} doesn't switch and read power: name an agent that does",
            rule="agent",
            agent=agent.name,
        )
    if len(device.options) + len(secrets) > MAX_OPTIONS:
        raise invalid(f"{agent.name} was given more than {MAX_OPTIONS} options", rule="options")
    for name, value in device.options.items():
        parameter = _known(agent, name)
        if is_secret(name):
            raise invalid(
                f"{name} of {agent.name} is a secret: give it with the secrets, where it is never shown",
                rule="secret",
                option=name,
            )
        _check_value(agent, parameter, value)
    for name, value in secrets.items():
        _known(agent, name)
        _check_text(agent, name, value)
        if not is_secret(name):
            raise invalid(
                f"{name} of {agent.name} is no secret: give it with the options", rule="secret", option=name
            )
    given = {"action", "ip", "ipport", *device.options, *secrets} | (
        {"username"} if device.username else set()
    )
    missing = [
        p.name for p in agent.parameters.values() if p.required and p.name not in given and not p.default
    ]
    if missing:
        raise invalid(
            f"{agent.name} needs {', '.join(missing)}: {agent.parameters[missing[0]].description or 'set it'}",
            rule="option",
            missing=missing,
        )
    if agent.name in SHOWS_SECRETS or any("snmp" in name for name in agent.parameters):
        helper = SHOWS_SECRETS.get(agent.name, "snmpget")
        raise invalid(
            f"{agent.name} hands its password to {helper} where every user of the host can read it: use another"
            " way to this device, such as IPMI, Redfish or SSH",
            rule="agent",
            agent=agent.name,
        )


def check_name(name: str) -> None:
    """Raises Refused(invalid) for what is no fence agent, or none that switches power."""
    if not AGENT_NAME.fullmatch(name):
        raise invalid(
            f"{name[:60]!r} isn't a fence agent's name: write it as in fence_ipmilan or fence_redfish",
            rule="agent",
        )
    if name in NOT_POWER:
        raise invalid(
            f"{name} proves nothing: {NOT_POWER[name]}; name an agent that switches power",
            rule="agent",
            agent=name,
        )


def near(name: str, known: Iterable[str]) -> list[str]:
    """Of the known names those that may have been meant."""
    return difflib.get_close_matches(name, list(known), n=3)


def check_frame(device: FenceDevice) -> None:
    """What can be told without the agent at hand. Raises Refused(invalid)."""
    check_name(device.agent)
    if not (HOST_NAME.fullmatch(device.address) or is_ipv6(device.address)):
        raise invalid(
            f"{device.address[:60]!r} is neither a host name nor an IP address: write the BMC's address, and the port"
            " apart from it",
            rule="address",
        )
    if not 0 <= device.port <= 65535:
        raise invalid(
            f"port {device.port} doesn't exist: write 1 to 65535, or 0 for the agent's own", rule="port"
        )
    if not MIN_SECONDS <= device.timeout_seconds <= MAX_SECONDS:
        raise invalid(
            f"an action may take {MIN_SECONDS:g} to {MAX_SECONDS:g} s, not {device.timeout_seconds:g}",
            rule="timeout_seconds",
        )
    _check_line("username", device.username)


def is_ipv6(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 6 and "%" not in address
    except ValueError:
        return False


def _known(agent: AgentInfo, name: str) -> Parameter:
    why = SET_ELSEWHERE.get(name)
    if why is None and name.endswith(RUNS_SOMETHING):
        why = "it runs a program on the host that runs the agent"
    if why is not None:
        raise invalid(f"{name} of {agent.name} can't be set: {why}", rule="option", option=name)
    parameter = agent.parameters.get(name)
    if parameter is None:
        meant = near(name, agent.parameters)
        hint = f"did you mean {' or '.join(meant)}?" if meant else "its man page lists those that it has"
        raise invalid(
            f"{agent.name} has no option {name[:60]!r}: {hint}", rule="option", option=name[:60], near=meant
        )
    return parameter


def _check_value(agent: AgentInfo, parameter: Parameter, value: str) -> None:
    _check_text(agent, parameter.name, value)
    wanted = ""
    if parameter.kind == "boolean" and value.lower() not in TRUE | FALSE:
        wanted = "1 or 0"
    elif parameter.kind in ("integer", "second") and not value.isdecimal():
        wanted = "a whole number"
    elif parameter.choices and value not in parameter.choices:
        wanted = "one of " + ", ".join(parameter.choices)
    if wanted:
        raise invalid(
            f"{parameter.name} of {agent.name} must be {wanted}, not {value[:60]!r}",
            rule="option",
            option=parameter.name,
        )


def _check_text(agent: AgentInfo, name: str, value: str) -> None:
    if not value:
        raise invalid(
            f"{name} of {agent.name} is empty: give a value, or leave it out", rule="option", option=name
        )
    _check_line(f"{name} of {agent.name}", value)


def _check_line(what: str, value: str) -> None:
    """Agents read lines, cut blanks off both ends, and take quotes around a value for theirs. Never shows the value."""
    if len(value) > MAX_VALUE or not value.isprintable():
        raise invalid(f"{what} must be one line of at most {MAX_VALUE} printable characters", rule="option")
    if value != value.strip() or (len(value) > 1 and value[0] == value[-1] == '"'):
        raise invalid(
            f"{what} can't begin or end with a blank or stand in quotes: fence agents cut them off",
            rule="option",
        )


def told(
    agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str], action: PowerAction
) -> dict[str, str]:
    """What the agent is told, by name. A switch that is off is left out unless it is on by itself: agents take its
    presence for on."""
    # fence_redfish puts it into a URL as it is.
    in_url = SYSTEMS_URI in agent.parameters and is_ipv6(device.address)
    said = {"action": action.value, "ip": f"[{device.address}]" if in_url else device.address}
    if device.port:
        said["ipport"] = str(device.port)
    if device.username:
        said["username"] = device.username
    for name, value in device.options.items():
        parameter = agent.parameters[name]
        if parameter.kind == "boolean" and value.lower() in FALSE and parameter.default.lower() not in TRUE:
            continue
        said[name] = value
    if "power_timeout" in agent.parameters:
        # Below ours, so that the agent ends by itself and says why.
        said.setdefault("power_timeout", str(max(1, int(device.timeout_seconds - OWN_WORDS_SECONDS))))
    if agent.runs_ipmitool:
        # It says nothing of what ipmitool said otherwise. It knows no password that it could print.
        said["verbose"] = "1"
    return said | dict(secrets)


def lines(said: Mapping[str, str]) -> bytes:
    """As agents read it from their standard input."""
    return "".join(f"{name}={value}\n" for name, value in said.items()).encode()


def state_of(action: PowerAction, exit_code: int, output: str) -> PowerState:
    """What the agent's end says of the power: a status counts only when its code and its words agree."""
    if action is PowerAction.STATUS:
        word = re.search(r"^status:\s*(on|off)\s*$", output, re.IGNORECASE | re.MULTILINE)
        said = (exit_code, word.group(1).lower() if word else "")
        return {(0, "on"): PowerState.ON, (2, "off"): PowerState.OFF}.get(said, PowerState.UNKNOWN)
    if exit_code == 0 and action in (PowerAction.ON, PowerAction.OFF):
        return PowerState(action.value)
    return PowerState.UNKNOWN


_NOISE = re.compile(
    r"^\s*$|INFO: Executing|DeprecationWarning|InsecureRequestWarning|^\s+(from|import|warnings\.warn)\b|'-h' for usage"
)
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d [\d:,.]+ (DEBUG: -?\d+ +)?")
_PLACE = re.compile(r" object at 0x[0-9a-f]+")
"""Where Python kept something: the same words would be others each time, and an event each."""


def last_words(text: str, secrets: Iterable[str]) -> str:
    """The last lines of what an agent said, as one line for people: bounded, without secrets or stamps."""
    # Hidden first: a cut could leave a part of one.
    hidden = without(text, secrets)
    told = _PLACE.sub("", hidden)
    kept = [_STAMP.sub("", line).strip() for line in told.splitlines() if not _NOISE.search(line)]
    words = "; ".join(dict.fromkeys(line for line in kept[-WORD_LINES:] if line))
    printable = "".join(letter if letter.isprintable() else "?" for letter in words)
    return printable if len(printable) <= WORDS_LIMIT else "…" + printable[1 - WORDS_LIMIT :]


def without(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret hidden, longest first so that none is left in part."""
    for secret in sorted(_forms(secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def forms_of(device: FenceDevice, secrets: Mapping[str, str]) -> list[str]:
    """What must not be shown of a device: its secrets, and how HTTP carries them."""
    pairs = [f"{device.username}:{secret}" for secret in secrets.values()]
    return [*secrets.values(), *(base64.b64encode(pair.encode()).decode() for pair in pairs)]


def _forms(secrets: Iterable[str]) -> set[str]:
    """Secrets as they are, and as programs show them: escaped, or percent-encoded."""
    found: set[str] = set()
    for secret in secrets:
        if secret:
            quoted = (urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret))
            found.update((secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], *quoted))
    return found
