"""What a fence agent says of itself: its parameters and actions, from the XML of its action `metadata`. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from volery.contracts.errors import Refused, unavailable

TRUE = frozenset({"1", "yes", "on", "true"})
FALSE = frozenset({"0", "no", "off", "false"})
IPMITOOL_PARAMETER = "ipmitool_path"
"""Agents that have it run ipmitool, and would put the password into its arguments."""
SYSTEMS_URI = "systems_uri"
"""Agents that have it speak Redfish."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One thing an agent can be told, in its own name."""

    name: str
    description: str = ""
    kind: str = "string"
    """string, integer, second, boolean, select."""
    default: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """One installed fence agent."""

    name: str
    path: str
    description: str
    parameters: Mapping[str, Parameter]
    """By name. Obsolete spellings are left out."""
    actions: frozenset[str]
    fabric: bool = False
    """It cuts a machine off its storage or network, and leaves its power alone."""

    @property
    def runs_ipmitool(self) -> bool:
        return IPMITOOL_PARAMETER in self.parameters


def read_metadata(name: str, path: str, xml: bytes) -> AgentInfo:
    """The agent's description of itself. Raises Refused(unavailable) for what isn't one."""
    try:
        root = ET.fromstring(xml)  # noqa: S314 (written by a program that root installed and we are about to run)
    except ET.ParseError as error:
        raise _unreadable(name, path, str(error)) from error
    found = [_parameter(element) for element in root.iterfind("parameters/parameter")]
    actions = {element.get("name", ""): element for element in root.iterfind("actions/action")}
    if not found or not actions:
        raise _unreadable(name, path, "it names no parameters or no actions")
    switching_on = actions.get("on")
    return AgentInfo(
        name=name,
        path=path,
        description=root.get("shortdesc", ""),
        parameters={parameter.name: parameter for parameter in found if parameter is not None},
        actions=frozenset(actions),
        fabric=switching_on is not None and switching_on.get("automatic") == "1",
    )


def _unreadable(name: str, path: str, why: str) -> Refused:
    return unavailable(
        f"{path} can't say what it is told ({why}): repair the package that has {name}", agent=name
    )


def _parameter(element: ET.Element) -> Parameter | None:
    if element.get("deprecated") == "1":
        return None
    content = element.find("content")
    kind, default = ("string", "") if content is None else (content.get("type"), content.get("default"))
    options = [] if content is None else content.findall("option")
    return Parameter(
        name=element.get("name", ""),
        description=" ".join(element.findtext("shortdesc", "").split()),
        kind=kind or "string",
        default=default or "",
        required=element.get("required") == "1",
        choices=tuple(option.get("value", "") for option in options),
    )
