"""The BMCs of lab hosts: the real fence agents really end and start a host, and each way of being broken is one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lab.bmc import Bmc
from lab.board import Fault
from lab.errors import LabError
from lab.lab import Lab
from lab.layout import LabLayout
from lab.network import BRIDGE
from lab.record import LabRecord
from tests.lab.test_lab import ROOT, leftovers, start_domain
from volery.contracts.base import encode
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.fencing import running
from volery.fencing.confirm import confirm_off
from volery.fencing.identity import same_machine

INSIDE = """\
import asyncio, sys, pathlib, msgspec
from volery.contracts.base import encode
from volery.contracts.fencing import FenceDevice, PowerAction
from volery.fencing import running
told = msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=tuple[FenceDevice, dict[str, str]])
print(encode(asyncio.run(running.run(PowerAction(sys.argv[2]), *told))).decode())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.up(2)
        yield lab
    finally:
        lab.down()
    assert leftovers(lab.layout) == []


@pytest.fixture
def lab(made: Lab) -> Lab:
    """Both hosts on, both BMCs as they should be, whatever the test before left."""
    for host in made.hosts:
        made.bmc(host.number).set_fault(Fault.NONE)
        if host.status().power == "frozen":
            host.power_off()
        host.power_on()
    return made


def device(lab: Lab, number: int, agent: str, seconds: float = 60) -> FenceDevice:
    bmc = lab.bmc(number)
    options = {"ssl_insecure": "1"} if agent == "fence_redfish" else {}
    return FenceDevice(
        agent=agent, address=bmc.address, username=bmc.login[0], options=options, timeout_seconds=seconds
    )


async def act(
    lab: Lab, action: PowerAction, number: int = 1, agent: str = "fence_redfish", seconds: float = 60
) -> PowerAnswer:
    secrets = {"password": lab.bmc(number).login[1]}
    return await running.run(action, device(lab, number, agent, seconds), secrets)


@pytest.mark.parametrize("agent", ["fence_redfish", "fence_ipmilan"])
async def test_power_is_really_cut_and_comes_back_as_another_boot(lab: Lab, agent: str) -> None:
    host = lab.host(1)
    before = host.boot
    assert before is not None
    start_domain(host)
    host.freeze()  # a board doesn't ask the operating system
    confirmed = await confirm_off(lambda action: act(lab, action, agent=agent))
    assert confirmed.off
    assert host.boot is None
    assert not Path(f"/proc/{before.init.pid}").exists()
    assert lab.host(2).status().power == "on"
    answer = await act(lab, PowerAction.ON, agent=agent)
    assert answer.state is PowerState.ON
    host.wait_for_libvirtd()
    after = host.boot
    assert after is not None
    assert after.boot_id != before.boot_id
    assert host.pids("qemu-system-x86_64") == []


def test_another_host_is_the_executor(lab: Lab) -> None:
    """As its agent does it: within the host's own processes, over the lab's network, also while the target is cut."""
    lab.host(1).cut()
    try:
        for agent in ("fence_redfish", "fence_ipmilan"):
            told = lab.shared / f"{agent}.json"
            told.write_bytes(encode((device(lab, 1, agent), {"password": lab.bmc(1).login[1]})))
            command = [sys.executable, "-c", INSIDE, str(lab.shared_on_hosts / told.name), "status"]
            done = lab.host(2).exec(["env", f"PYTHONPATH={ROOT}", *command])
            answer = msgspec.json.decode(done.stdout, type=PowerAnswer)
            assert answer.state is PowerState.ON, answer.words
    finally:
        lab.host(1).join()


async def test_the_identity_is_the_hosts(lab: Lab) -> None:
    for number in (1, 2):
        wanted = lab.host(number).layout.product_uuid.read_text()
        for agent in ("fence_redfish", "fence_ipmilan"):
            said = await act(lab, PowerAction.IDENTITY, number, agent)
            assert same_machine(said.identity, wanted), said


@pytest.mark.parametrize("agent", ["fence_redfish", "fence_ipmilan"])
async def test_a_swapped_bmc_is_the_other_hosts(lab: Lab, agent: str) -> None:
    lab.bmc(1).set_fault(Fault.SWAPPED)
    said = await act(lab, PowerAction.IDENTITY, agent=agent)
    assert same_machine(said.identity, str(lab.host(2).layout.machine_uuid))
    await act(lab, PowerAction.OFF, agent=agent)
    assert [host.status().power for host in lab.hosts] == ["on", "off"]


async def test_liars_switch_nothing(lab: Lab) -> None:
    for fault, state in ((Fault.SAYS_ON, PowerState.ON), (Fault.SAYS_OFF, PowerState.OFF)):
        lab.bmc(1).set_fault(fault)
        for agent in ("fence_redfish", "fence_ipmilan"):
            assert (await act(lab, PowerAction.STATUS, agent=agent)).state is state
    await act(lab, PowerAction.OFF)
    assert lab.host(1).status().power == "on"
    lab.bmc(1).set_fault(Fault.SAYS_ON)
    assert (await act(lab, PowerAction.OFF, seconds=6)).state is PowerState.UNKNOWN
    assert lab.host(1).status().power == "on"


async def test_a_bmc_that_refuses_or_is_gone_or_thinks_says_nothing(lab: Lab) -> None:
    for fault in (Fault.REFUSES, Fault.UNREACHABLE, Fault.SLOW):
        lab.bmc(1).set_fault(fault)
        for agent in ("fence_redfish", "fence_ipmilan"):
            answer = await act(lab, PowerAction.STATUS, agent=agent, seconds=1.5)
            assert answer.state is PowerState.UNKNOWN, (fault, agent)
            assert answer.words
    assert (await act(lab, PowerAction.STATUS, 2)).state is PowerState.ON
    lab.bmc(1).set_fault(Fault.NONE)
    for agent in ("fence_redfish", "fence_ipmilan"):
        assert (await act(lab, PowerAction.STATUS, agent=agent)).state is PowerState.ON


def test_hosts_come_and_go_and_storage_and_bmcs_stay_where_they_are(lab: Lab) -> None:
    """The switch's own address in the network, which it would else take from the port with the lowest one."""

    def mac() -> str:
        link = ["ip", "-n", lab.layout.switch, "-j", "link", "show", BRIDGE]
        told = subprocess.run(link, capture_output=True, text=True, check=True).stdout
        return str(json.loads(told)[0]["address"])

    before = mac()
    for host in lab.hosts:
        host.power_off()
        assert mac() == before
        host.power_on()
        assert mac() == before


async def test_a_bmc_outlives_the_storages_network(lab: Lab) -> None:
    lab.target.cut()
    try:
        assert (await act(lab, PowerAction.STATUS)).state is PowerState.ON
    finally:
        lab.target.join()
    assert (await act(lab, PowerAction.STATUS)).state is PowerState.ON


def test_the_command_line_breaks_mends_and_refuses(lab: Lab) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lab", *arguments, "--state", str(lab.layout.state)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run("bmc", "1", "says-on").returncode == 0
    shown = json.loads(run("status", "-o", "json").stdout)
    assert [host["bmc_fault"] for host in shown["hosts"]] == ["says-on", "none"]
    assert shown["hosts"][0]["bmc_address"] == lab.bmc(1).address
    assert "says-on" in run("status").stdout
    assert run("bmc", "1", "none").returncode == 0
    assert "unreachable" in run("bmc", "1", "broken").stderr
    assert "has no host 9" in run("bmc", "9", "none").stderr


def test_a_lab_of_one_has_nothing_to_swap_with(tmp_path: Path) -> None:
    only = LabLayout(tmp_path, "one").host(1)
    only.directory.mkdir(parents=True)
    bmc = Bmc(only, LabRecord(name="one", subnet="10.98.0.0/24"))
    with pytest.raises(LabError, match="no other BMC to swap with"):
        bmc.set_fault(Fault.SWAPPED)
    assert bmc.fault is Fault.NONE
