"""The real fence agents against real endpoints: what they come to, what they say, and what they never show."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from lab.board import Fault
from tests.support.machines import LOGIN, FileChassis, Machine, processes
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.fencing import catalog, process, rules, running
from volery.fencing.identity import same_machine

SECRET = LOGIN[1]


async def act(machine: Machine, action: PowerAction) -> PowerAnswer:
    return await running.run(action, machine.device, machine.secrets)


async def until(look: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """For what nobody announces."""
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def test_power_is_read_and_switched(machine: Machine) -> None:
    assert (await act(machine, PowerAction.STATUS)).state is PowerState.ON
    off = await act(machine, PowerAction.OFF)
    assert (off.state, off.exit_code) == (PowerState.OFF, 0)
    assert "Powered OFF" in off.words
    assert not machine.chassis.is_on()
    status = await act(machine, PowerAction.STATUS)
    assert (status.state, status.exit_code) == (PowerState.OFF, 2)
    assert (await act(machine, PowerAction.OFF)).state is PowerState.OFF
    assert (await act(machine, PowerAction.ON)).state is PowerState.ON
    assert machine.chassis.switched == ["off", "on"]


async def test_a_bmc_says_whose_it_is(machine: Machine) -> None:
    said = await act(machine, PowerAction.IDENTITY)
    assert said.identity == said.identity.lower()
    assert same_machine(said.identity, machine.chassis.uuid)
    assert not same_machine(said.identity, FileChassis(machine.chassis.directory.with_name("two")).uuid)


async def test_a_swapped_bmc_says_the_other_machine(redfish: Machine) -> None:
    redfish.breaks(Fault.SWAPPED)
    other = FileChassis(redfish.chassis.directory.with_name("two"))
    said = await act(redfish, PowerAction.IDENTITY)
    assert said.identity == other.uuid
    del redfish.device.options["systems_uri"]  # found through the service's root now
    assert (await act(redfish, PowerAction.IDENTITY)).identity == other.uuid


async def test_a_board_that_does_not_obey_is_not_off(machine: Machine) -> None:
    machine.breaks(Fault.SAYS_ON)
    machine.device = replace(machine.device, timeout_seconds=8)
    answer = await act(machine, PowerAction.OFF)
    assert answer.state is PowerState.UNKNOWN
    assert "Timed out waiting to power OFF" in answer.words
    assert machine.chassis.is_on()


async def test_a_wrong_password_is_told_in_the_agents_words(redfish: Machine) -> None:
    redfish.secrets = {"password": "another"}
    answer = await act(redfish, PowerAction.STATUS)
    assert (answer.state, answer.exit_code) == (PowerState.UNKNOWN, 1)
    assert answer.words
    identity = await act(redfish, PowerAction.IDENTITY)
    assert identity.identity == ""
    assert "refuses the login" in identity.words


async def test_a_wrong_user_is_told_in_ipmitools_words(ipmi: Machine) -> None:
    ipmi.device = replace(ipmi.device, username="nobody")
    answer = await act(ipmi, PowerAction.STATUS)
    assert answer.state is PowerState.UNKNOWN
    assert "Invalid user name" in answer.words


async def test_a_certificate_nobody_vouches_for_is_refused(redfish: Machine) -> None:
    redfish.device.options["ssl_insecure"] = "0"
    for action in (PowerAction.STATUS, PowerAction.IDENTITY):
        answer = await act(redfish, action)
        assert (answer.state, answer.identity) == (PowerState.UNKNOWN, "")
        assert "certificate" in answer.words.lower()


async def test_no_process_shows_the_password_and_none_is_left(machine: Machine) -> None:
    """Looked at while the agent, and ipmitool below it, wait for a BMC that thinks."""
    machine.breaks(Fault.SLOW)
    port = str(machine.device.port).encode()
    for action in (PowerAction.STATUS, PowerAction.IDENTITY):
        machine.device = replace(machine.device, timeout_seconds=2)
        task = asyncio.create_task(act(machine, action))
        seen: set[bytes] = set()
        while not task.done():
            for pid, shown in processes().items():
                name = shown.split(b"\0", 1)[0].rpartition(b"/")[2]
                if pid == os.getpid() or not (name == b"ipmitool" or b"fenc" in shown):
                    continue
                seen.add(b"ipmitool" if name == b"ipmitool" and port in shown else b"agent")
                assert SECRET.encode() not in shown
            await asyncio.sleep(0.01)
        if machine.device.agent == "fence_ipmilan":
            if action is PowerAction.STATUS:
                assert seen == {b"agent", b"ipmitool"}
        else:
            assert seen == {b"agent"}
        answer = await task
        assert (answer.state, answer.identity) == (PowerState.UNKNOWN, "")
        assert answer.exit_code in (running.NOT_RUN, 1)
        assert "imed out" in answer.words or "within 2 s" in answer.words
        mine = [shown for shown in processes().values() if shown.startswith(b"ipmitool") and port in shown]
        assert mine == []


async def test_ipmitool_reads_the_password_from_memory(ipmi: Machine, tmp_path: Path) -> None:
    """It hides what it was given in its arguments at once; whoever looks in that moment sees it. So it is given none."""
    places, shown = tmp_path / "bin", tmp_path / "shown"
    places.mkdir()
    program = places / "ipmitool"
    program.write_text(f'#!/bin/sh\ncat /proc/$$/cmdline /proc/$$/environ >> {shown}\nexec {REAL} "$@"\n')
    program.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{places}:{path}"
    try:
        assert (await act(ipmi, PowerAction.STATUS)).state is PowerState.OFF
        assert (await act(ipmi, PowerAction.IDENTITY)).identity
    finally:
        os.environ["PATH"] = path
    calls = shown.read_bytes()
    assert calls.count(b"\0chassis\0power\0status\0") == 1
    assert calls.count(b"\0mc\0guid\0") == 1
    assert calls.count(b"\0-f\0/proc/") == 2
    assert SECRET.encode() not in calls


REAL = process.find_program("ipmitool")
PARROT = """\
#!/bin/sh
told=$(cat)
case "$told" in *action=metadata*) cat <<'XML'
<resource-agent name="fence_parrot" shortdesc="repeats"><parameters>
<parameter name="action"><content type="string"/></parameter><parameter name="ip"><content type="string"/></parameter>
<parameter name="username"><content type="string"/></parameter>
<parameter name="password"><content type="string"/></parameter>
<parameter name="plug" required="1"><content type="string"/><shortdesc>which outlet</shortdesc></parameter>
</parameters><actions><action name="on"/><action name="off"/><action name="status"/></actions></resource-agent>
XML
exit 0;; esac
echo "Status: ON"
env
printf '%s\\n' "$told" | sed -n 's/^username=//p; s/^password=//p' | paste -sd: | tr -d '\\n' | base64 -w0 >&2
printf '\\n%s\\n' "$told" | tail -n 2 >&2
"""


@pytest.fixture
def parrot(tmp_path: Path) -> catalog.Catalog:
    program = tmp_path / "bin" / "fence_parrot"
    program.parent.mkdir()
    program.write_text(PARROT)
    program.chmod(0o755)
    return catalog.Catalog(f"{program.parent}")


async def test_what_an_agent_repeats_is_hidden(parrot: catalog.Catalog) -> None:
    device = FenceDevice(agent="fence_parrot", address="10.0.0.1", username="admin", options={"plug": "7"})
    answer = await running.run(PowerAction.STATUS, device, {"password": SECRET}, catalog=parrot)
    assert answer.state is PowerState.ON
    assert answer.words.count(rules.HIDDEN) == 2, "a line of each"
    assert SECRET not in answer.words
    assert base64.b64encode(f"admin:{SECRET}".encode()).decode() not in answer.words
    with pytest.raises(Refused, match=r"fence_parrot needs plug: which outlet") as refused:
        await running.run(
            PowerAction.STATUS, replace(device, options={}), {"password": SECRET}, catalog=parrot
        )
    assert refused.value.kind is Kind.INVALID
    identity = await running.run(PowerAction.IDENTITY, device, {"password": SECRET}, catalog=parrot)
    assert "can't say which machine" in identity.words


async def test_the_environment_of_an_agent_is_its_own(parrot: catalog.Catalog) -> None:
    os.environ["VOLERY_TEST_SECRET"] = "of-another"
    try:
        ended = await process.run(
            [str(Path(parrot.path) / "fence_parrot")], stdin=b"action=status\n", timeout_seconds=20
        )
    finally:
        del os.environ["VOLERY_TEST_SECRET"]
    assert "PATH=" in ended.output
    assert "of-another" not in ended.output


def test_an_agent_that_was_frozen_too_long_does_nothing_more(tmp_path: Path) -> None:
    """A host that thaws after an hour must not switch off a machine that is healthy by then."""
    go, acted = tmp_path / "go", tmp_path / "acted"
    agent = tmp_path / "agent.sh"
    agent.write_text(f"#!/bin/sh\necho begun\nwhile [ ! -e {go} ]; do sleep 0.01; done\ntouch {acted}\n")
    agent.chmod(0o755)
    child = subprocess.Popen([sys.executable, process.ALARMED, "1.5", str(agent)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"begun\n"
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while not pending(child.pid) >> (signal.SIGALRM - 1) & 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go.touch()
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(30) == -signal.SIGALRM
    child.stdout.close()
    assert not acted.exists()


def pending(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("ShdPnd")), 16)


async def test_whoever_is_cancelled_leaves_no_agent(machine: Machine) -> None:
    machine.breaks(Fault.SLOW)
    port = str(machine.device.port).encode()
    task = asyncio.create_task(act(machine, PowerAction.STATUS))

    def children() -> list[bytes]:
        mine = f"volery/fencing/alarmed.py\0{machine.device.timeout_seconds + 1}".encode()
        return [s for s in processes().values() if mine in s or (b"ipmitool\0" in s and port in s)]

    await until(lambda: machine_is_asked(machine), "the agent runs")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == []


def machine_is_asked(machine: Machine) -> bool:
    """Whether an agent of this process runs."""
    return any(
        machine.device.agent.encode() in shown
        and Path(f"/proc/{pid}/stat").exists()
        and parent(pid) == os.getpid()
        for pid, shown in processes().items()
    )


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


async def test_what_is_not_installed_is_refused_with_what_to_install(parrot: catalog.Catalog) -> None:
    device = FenceDevice(agent="fence_parot", address="10.0.0.1")
    with pytest.raises(
        Refused, match=r"isn't installed.*fence-agents-parot.*or name fence_parrot"
    ) as refused:
        await running.run(PowerAction.STATUS, device, {}, catalog=parrot)
    assert refused.value.kind is Kind.UNAVAILABLE
    assert catalog.agents(parrot.path) == ["fence_parrot"]
    assert {"fence_ipmilan", "fence_redfish"} <= set(catalog.agents())
    assert "fence_dummy" not in catalog.agents()
