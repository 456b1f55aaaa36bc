"""The lab does to a host what a machine room does: power, cable, daemons, storage; and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.host import Host
from lab.lab import Lab
from tests.support.leftovers import leftovers

ROOT = Path(__file__).resolve().parents[2]

# No disk, no network, no operating system: SeaBIOS finds nothing to boot and halts.
DOMAIN = """\
<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
<devices><serial type='pty'/><memballoon model='none'/></devices></domain>
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    try:
        made.up(2)
        yield made
    finally:
        made.down()


@pytest.fixture
def host(lab: Lab) -> Host:
    return as_new(lab, 1)


@pytest.fixture
def other(lab: Lab) -> Host:
    return as_new(lab, 2)


def as_new(lab: Lab, number: int) -> Host:
    """The host on, joined, with its libvirtd and without guests, whatever the test before left."""
    host = lab.host(number)
    host.join()
    if host.status().power == "frozen":
        host.thaw()
    host.layout.agent_command.unlink(missing_ok=True)
    host.power_on()
    if host.pids("qemu-system-x86_64") or host.pids("agent") or not host.pids("libvirtd"):
        host.power_off()
        host.power_on()
    return host


def until(condition: Callable[[], bool], what: str, timeout_seconds: float = 10.0) -> None:
    """For what nobody announces."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"within {timeout_seconds} s: {what}"
        time.sleep(0.01)


def start_domain(host: Host, *flags: str) -> str:
    name = f"g{uuid.uuid4().hex[:8]}"
    file = host.layout.lab.shared / f"{name}.xml"
    file.write_text(DOMAIN.format(name=name))
    host.exec(["virsh", "create", str(host.shared / file.name), *flags])
    return name


def domains(host: Host) -> list[str]:
    return host.exec(["virsh", "list", "--name"]).stdout.split()


def reaches(source: Host, destination: str) -> bool:
    done = source.exec(["ping", "-c", "1", "-W", "1", destination], check=False)
    return done.returncode == 0


def answers(ip: str) -> bool:
    command = ["ping", "-c", "1", "-W", "1", ip]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- identity


def test_each_host_is_a_machine_of_its_own(host: Host, other: Host) -> None:
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id", "/etc/hostname"):
        here, there = (one.exec(["cat", path]).stdout for one in (host, other))
        assert here != there
        assert here != Path(path).read_text()
    capabilities = host.exec(["virsh", "capabilities"]).stdout
    assert f"<uuid>{host.layout.machine_uuid}</uuid>" in capabilities
    assert host.exec(["ps", "-p", "1", "-o", "pid="]).stdout.strip() == "1"
    assert host.exec(["test", "-e", "/dev/kvm"], check=False).returncode == 1


def test_a_host_runs_a_guest_in_its_own_control_group(host: Host) -> None:
    start_domain(host, "--paused")
    [qemu] = host.pids("qemu-system-x86_64")
    groups = Path(f"/proc/{qemu}/cgroup").read_text()
    assert f"/{host.layout.cgroup}/machine" in groups
    assert qemu in host.pids()


def test_the_machine_reaches_libvirt_over_the_network_and_on_its_socket(host: Host) -> None:
    for uri in (host.libvirt_uri, host.local_libvirt_uri):
        done = subprocess.run(["virsh", "-c", uri, "hostname"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "h1"


def test_hosts_have_a_nat_network_with_addresses_for_guests(host: Host) -> None:
    """libvirt's own: a bridge, dnsmasq and nftables rules, inside this host only."""
    host.exec(["virsh", "net-start", "default"])
    assert host.pids("dnsmasq")
    name = start_domain(host, "--paused")
    host.exec(["virsh", "attach-interface", name, "network", "default", "--live"])
    assert "vnet0" in host.exec(["ip", "link", "show", "master", "virbr0"]).stdout
    assert host.exec(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout.strip() == "1"
    assert not Path("/sys/class/net/virbr0").exists()
    host.exec(["virsh", "net-destroy", "default"])


def test_vxlan_carries_frames_between_hosts(host: Host, other: Host) -> None:
    for here, there, ip in ((host, other, "192.168.7.1/24"), (other, host, "192.168.7.2/24")):
        here.exec(
            f"ip link add vx10 type vxlan id 10 local {here.ip} remote {there.ip} dstport 4789 "
            "dev eth0".split()
        )
        here.exec(["ip", "address", "add", ip, "dev", "vx10"])
        here.exec(["ip", "link", "set", "vx10", "up"])
    until(lambda: reaches(host, "192.168.7.2"), "the VXLAN answers")
    for one in (host, other):
        one.exec(["ip", "link", "del", "vx10"])


# --- daemons


def test_a_guest_outlives_libvirtd_and_is_found_again(host: Host) -> None:
    name = start_domain(host, "--paused")
    [qemu] = host.pids("qemu-system-x86_64")
    host.kill_libvirtd()
    assert host.pids("libvirtd") == []
    assert host.pids("qemu-system-x86_64") == [qemu]
    host.start_libvirtd()
    assert domains(host) == [name]
    assert host.pids("qemu-system-x86_64") == [qemu]


def test_libvirtd_killed_by_accident_comes_back_by_itself(host: Host) -> None:
    [before] = host.pids("libvirtd")
    os.kill(before, signal.SIGKILL)
    until(lambda: host.pids("libvirtd") not in ([], [before]), "libvirtd was started again")
    host.wait_for_libvirtd()


def test_the_agent_runs_under_the_host_and_is_restarted(host: Host) -> None:
    host.install_agent(["sleep", "1000"], {"VOLERY_AGENT_TEST": "with spaces = and more"})
    [first] = host.pids("agent")
    environment = Path(f"/proc/{first}/environ").read_bytes().split(b"\0")
    assert b"VOLERY_AGENT_TEST=with spaces = and more" in environment
    assert f"VOLERY_HOME={host.home}".encode() in environment
    host.kill_agent()
    until(lambda: host.pids("agent") not in ([], [first]), "the agent was started again")

    host.kill_agent(stay_down=True)
    host.kill_libvirtd(stay_down=False)  # makes pid 1 look at every unit
    until(lambda: bool(host.pids("libvirtd")), "libvirtd was started again")
    assert host.pids("agent") == []
    host.start_agent()
    assert len(host.pids("agent")) == 1

    host.power_off()
    host.power_on(hold=["agent"])
    assert host.pids("agent") == []
    host.power_off()
    host.power_on()
    until(lambda: bool(host.pids("agent")), "the agent started at boot")
    host.layout.agent_command.unlink()
    host.kill_agent()


def test_a_host_that_is_shut_down_ends_its_agent_first_and_tells_it_why(host: Host) -> None:
    mark, log = host.layout.shutdown_mark, host.layout.log / "agent.out"
    script = f'trap "[ -e {mark} ] && echo goodbye; exit" TERM; echo ready; while :; do sleep 0.05; done'
    host.install_agent(["sh", "-c", script], {})
    until(lambda: log.exists() and "ready" in log.read_text(), "the agent listens")
    host.power_down()
    assert host.boot is None
    assert log.read_text().endswith("goodbye\n")
    host.power_on()
    assert not mark.exists()


def test_an_agent_that_cannot_start_is_tried_again_and_says_why(other: Host) -> None:
    other.install_agent(["sh", "-c", "exit 3"], {})
    other.layout.agent_command.write_text('["/nowhere/agent"]')
    log = other.layout.log / "agent.out"
    until(lambda: log.exists() and "/nowhere/agent did not start" in log.read_text(), "it says so")
    other.layout.agent_command.unlink()
    assert other.pids("libvirtd")


def test_a_command_that_takes_too_long_is_ended_inside_too(host: Host) -> None:
    with pytest.raises(LabError, match=r"tail -f /dev/null. on host 1 did not end within 0\.2 s"):
        host.exec(["tail", "-f", "/dev/null"], timeout_seconds=0.2)
    until(lambda: not host.pids("tail"), "the program has ended")


# --- power and cable


def test_power_off_ends_everything_at_once(host: Host) -> None:
    before = host.boot
    assert before is not None
    took = []
    for _ in range(3):  # the fastest counts: other work on the machine only adds
        host.power_on()
        start_domain(host)
        everything = host.pids()
        assert len(everything) >= 3
        started = time.monotonic()
        host.power_off()
        took.append(time.monotonic() - started)
        assert not any(map(alive, everything))
    assert min(took) < 0.5
    assert not answers(host.ip)
    with pytest.raises(LabError, match="is off"):
        host.exec(["true"])

    host.power_on()
    after = host.boot
    assert after is not None
    assert after.boot_id != before.boot_id
    inside = host.exec(["cat", "/proc/sys/kernel/random/boot_id"]).stdout.strip()
    assert inside == after.boot_id
    assert domains(host) == []


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killing_pid_1_from_outside_is_a_power_cut(host: Host) -> None:
    """What a fake BMC, or a fault test without the lab's classes, does."""
    start_domain(host, "--paused")
    assert host.boot is not None
    everything = host.pids()
    os.kill(host.boot.init.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, everything)), "all its processes ended")
    assert host.status().power == "off"
    until(lambda: not answers(host.ip), "its network is gone")
    host.power_on()
    assert answers(host.ip)


def test_a_defined_guest_and_files_survive_a_power_cut(host: Host) -> None:
    file = host.layout.lab.shared / "defined.xml"
    file.write_text(DOMAIN.format(name="defined"))
    host.exec(["virsh", "define", str(host.shared / file.name)])
    host.exec(["touch", str(host.home / "kept"), "/run/lost"])
    host.power_off()
    host.power_on()
    assert host.exec(["virsh", "list", "--all", "--name"]).stdout.split() == ["defined"]
    host.exec(["test", "-e", str(host.home / "kept")])
    assert host.exec(["test", "-e", "/run/lost"], check=False).returncode == 1
    host.exec(["virsh", "undefine", "defined"])


def test_a_cut_host_is_unreachable_until_joined(host: Host, other: Host) -> None:
    assert reaches(other, host.ip)
    host.cut()
    assert not reaches(other, host.ip)
    assert not answers(host.ip)
    assert domains(host) == []  # its own socket works on
    host.power_off()
    host.power_on()
    assert not reaches(other, host.ip)  # a cable stays pulled
    assert host.status().cable == "cut"
    host.join()
    until(lambda: reaches(other, host.ip), "it is back")


def test_a_frozen_host_stands_still_and_goes_on(host: Host) -> None:
    start_domain(host)
    host.freeze()
    assert host.status().power == "frozen"
    states = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] for pid in host.pids()}
    assert states == {"T"}
    assert answers(host.ip)  # the kernel still does
    host.thaw()
    assert len(domains(host)) == 1
    host.freeze()
    host.power_off()
    assert host.status().power == "off"


def test_a_boot_that_fails_says_why_and_leaves_nothing(lab: Lab, host: Host) -> None:
    host.power_off()
    lab.layout.hosts_file.unlink()
    with pytest.raises(LabError, match=r"did not boot: .*hosts\.txt"):
        host.power_on()
    assert list(Path("/sys/fs/cgroup").glob(f"**/{host.layout.cgroup}")) == []
    assert host.status().power == "off"
    lab.up(2)
    assert host.status().power == "on"


def test_repeating_an_action_changes_nothing(lab: Lab, host: Host) -> None:
    before = host.pids()
    host.power_on()
    lab.up(2)
    assert host.pids() == before
    host.power_off()
    host.power_off()
    assert host.status().power == "off"


# --- what hosts share


@pytest.mark.parametrize("flags", [[], ["--postcopy", "--postcopy-after-precopy"]])
def test_a_running_guest_moves_between_hosts(host: Host, other: Host, flags: list[str]) -> None:
    name = start_domain(host)
    host.exec(
        ["virsh", "migrate", "--live", "--p2p", *flags, name, other.libvirt_uri]
    )  # fmt: skip
    assert domains(host) == []
    assert domains(other) == [name]
    assert other.exec(["virsh", "domstate", name]).stdout.strip() == "running"
    assert host.pids("qemu-system-x86_64") == []


def test_the_shared_directory_is_one_and_the_homes_are_not(lab: Lab, host: Host, other: Host) -> None:
    host.exec(["sh", "-c", f"echo one > {host.shared}/note; echo mine > {host.home}/note"])
    assert other.exec(["cat", f"{other.shared}/note"]).stdout == "one\n"
    assert (lab.shared / "note").read_text() == "one\n"
    assert host.shared == other.shared
    assert other.exec(["test", "-e", f"{other.home}/note"], check=False).returncode == 1
    other.exec(["mountpoint", "-q", str(other.shared)])


def test_luns_are_listed_with_chap_only(lab: Lab, host: Host) -> None:
    target = lab.target
    listed = host.exec(["iscsi-ls", "-s", target.url()]).stdout
    assert target.name in listed
    assert [f"Lun:{number} " in listed for number in target.luns] == [True] * 4
    refused = host.exec(["iscsi-ls", "-s", target.url(authenticated=False)], check=False)
    assert "Lun:" not in refused.stdout
    assert "Authentication failure" in refused.stdout + refused.stderr


def test_qemu_writes_a_lun_that_another_host_reads(lab: Lab, host: Host, other: Host) -> None:
    number = lab.target.add_lun(16 << 20)
    url = lab.target.url(number)
    host.exec(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 4k", url])
    read = other.exec(["qemu-io", "-f", "raw", "-c", "read -P 0x5a 0 4k", url])
    assert "read 4096/4096" in read.stdout
    lab.target.kill()
    assert lab.target.process is None
    assert other.exec(["iscsi-ls", lab.target.url()], check=False).returncode != 0
    lab.target.start()
    read = other.exec(["qemu-io", "-f", "raw", "-c", "read -P 0x5a 0 4k", url])
    assert "read 4096/4096" in read.stdout
    lab.target.remove_lun(number)
    assert f"Lun:{number} " not in host.exec(["iscsi-ls", "-s", lab.target.url()]).stdout


def test_one_host_loses_its_way_to_the_storage_and_the_others_keep_theirs(
    lab: Lab, host: Host, other: Host
) -> None:
    look = ["timeout", "2", "iscsi-ls", lab.target.url()]
    host.cut_storage()
    try:
        assert host.exec(look, check=False).returncode != 0
        assert lab.target.name in other.exec(look).stdout
        assert reaches(host, other.ip)
        host.power_off()
        host.power_on()
        assert host.exec(look, check=False).returncode != 0
    finally:
        host.join_storage()
    assert lab.target.name in host.exec(look).stdout


# --- the lab as a whole


def test_two_labs_side_by_side_do_not_meet(lab: Lab, host: Host, tmp_path: Path) -> None:
    second = Lab(tmp_path / "second")
    try:
        second.up(1)
        assert second.name != lab.name
        assert second.subnet != lab.subnet
        assert not reaches(second.host(1), host.ip)  # also while the machine forwards packets
        assert not reaches(second.host(1), lab.gateway)
        assert second.host(1).pids("libvirtd") != host.pids("libvirtd")
        assert second.target.name not in host.exec(["iscsi-ls", lab.target.url()]).stdout
    finally:
        second.down()
    assert leftovers(second.layout) == []
    assert host.pids("libvirtd")
    assert not (tmp_path / "second").exists()


def test_labs_never_share_a_network(tmp_path: Path) -> None:
    """The second asks for the only network that the first has; what it had made by then goes too."""
    first, second = Lab(tmp_path / "first"), Lab(tmp_path / "second")
    only = f"10.97.{os.getpid() % 256}.0/24"
    try:
        first.up(1, networks=only)
        with pytest.raises(LabError, match="is free for lab"):
            second.up(1, networks=only)
        second.down()
        assert leftovers(second.layout) == []
        assert answers(first.host(1).ip)
    finally:
        first.down()
        second.down()


@pytest.mark.parametrize("moment", ["lab.json", "iscsi/tgtd.pid", "hosts/1/boot_id"])
def test_a_lab_tool_killed_in_the_middle_is_resumed(tmp_path: Path, moment: str) -> None:
    state = tmp_path / ("long" * 30)  # longer than a socket's path may be
    up = [sys.executable, "-m", "lab", "up", "--bare", "--hosts", "1", "--state", str(state)]
    process = subprocess.Popen(up, cwd=ROOT, stdout=subprocess.DEVNULL)
    resumed = Lab(state)
    try:
        until((state / moment).exists, f"{moment} appears")
        process.kill()
        process.wait()
        subprocess.run(up, cwd=ROOT, check=True, capture_output=True)
        assert domains(Lab(state).host(1)) == []
    finally:
        resumed.down()
    assert leftovers(resumed.layout) == []


def test_down_removes_a_lab_whose_record_is_lost_and_whose_guests_run(tmp_path: Path) -> None:
    broken = Lab(tmp_path / "lab")
    try:
        broken.up(1)
        host = broken.host(1)
        start_domain(host)
        host.exec(["virsh", "net-start", "default"])
        host.freeze()
        assert len(leftovers(broken.layout)) > 5
        broken.layout.record.unlink()
        host.layout.boot_record.unlink()
    finally:
        Lab(tmp_path / "lab").down()
    assert leftovers(broken.layout) == []


def test_the_command_line_shows_and_refuses(lab: Lab, host: Host) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lab", *arguments, "--state", str(lab.layout.state)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    status = run("status").stdout
    assert lab.gateway in status
    assert host.ip in status
    assert run("power-off", "1").returncode == 0
    assert run("power-on", "1").returncode == 0
    refused = run("power-off", "9")
    assert refused.returncode == 1
    assert "has no host 9 (it has 1, 2)" in refused.stderr
    inside = [sys.executable, "-m", "lab", "exec", "--state", str(lab.layout.state)]
    done = subprocess.run(
        [*inside, "1", "--", "hostname"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "h1\n"
