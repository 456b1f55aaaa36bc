"""Runs one fence agent once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer
from volery.fencing import identity, process, rules
from volery.fencing.catalog import CATALOG, Catalog
from volery.fencing.ipmi import memory_of_ipmitool
from volery.fencing.metadata import AgentInfo
from volery.fencing.process import Ended

NOT_RUN = -1


async def run(
    action: PowerAction,
    device: FenceDevice,
    secrets: Mapping[str, str],
    *,
    ask_id: str = "",
    catalog: Catalog = CATALOG,
) -> PowerAnswer:
    """One action, to its end or the device's time. Nothing is repeated.

    Raises Refused when nothing was done: `invalid` for a device that can't be used, `unavailable` when this machine
    doesn't have the agent. Whatever an agent that was started comes to is an answer.
    """
    agent = await catalog.check_device(device, dict(secrets))
    if action is PowerAction.IDENTITY:
        return await identity.ask(agent, device, secrets, ask_id)
    ended = await _end_of(agent, device, secrets, action)
    exit_code = NOT_RUN if ended.exit_code is None else ended.exit_code
    return PowerAnswer(
        ask_id=ask_id,
        action=action,
        state=rules.state_of(action, exit_code, ended.output),
        words=words_of(agent, device, secrets, ended),
        exit_code=exit_code,
    )


async def _end_of(
    agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str], action: PowerAction
) -> Ended:
    said = rules.told(agent, device, secrets, action)
    environment: Mapping[str, str] = {}
    with ExitStack() as memory:
        if agent.runs_ipmitool:
            password = said.pop("password", "")
            between = memory.enter_context(memory_of_ipmitool(password, device.timeout_seconds))
            said["ipmitool_path"], environment = between.program, between.environment
        return await process.run(
            [agent.path],
            stdin=rules.lines(said),
            timeout_seconds=device.timeout_seconds,
            environment=environment,
        )


def words_of(agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str], ended: Ended) -> str:
    words = rules.last_words(f"{ended.output}\n{ended.errors}", rules.forms_of(device, secrets))
    if ended.exit_code is None:
        late = f"{agent.name} did not end within {device.timeout_seconds:g} s"
        return f"{late}; {words}" if words else late
    if not words:
        # So ends fence_redfish when its login is refused.
        return (
            f"{agent.name} ended with {ended.exit_code} and gave no reason: check the login and the options"
        )
    return words
