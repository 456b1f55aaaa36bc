"""Logical networks in the kernel: each test's hosts are network namespaces, with real bridges, VXLAN and traffic."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from volery.contracts.ids import new_id
from volery.contracts.network_orders import ApplyNetworks, HostNetwork, NetworkKind

ROOT = Path(__file__).resolve().parents[2]
PORT = 4222


def ip(*arguments: str) -> Any:
    output = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(output) if output.lstrip().startswith("[") else output


@dataclass
class Namespace:
    """A host: its network namespace and its agent's state directory."""

    name: str
    state_dir: Path
    control_plane: str = ""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ip(self, *arguments: str) -> Any:
        return ip("-n", self.name, *arguments)

    def start(self, verb: str, order: ApplyNetworks | None = None) -> subprocess.Popen[bytes]:
        program = (sys.executable, "-m", "tests.support.network_program", verb, str(self.state_dir))
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *program, self.control_plane],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) if order else b"")
        process.stdin.close()
        process.stdin = None
        self._started.append(process)
        return process

    def act(self, verb: str, order: ApplyNetworks | None = None) -> dict[str, Any]:
        return answer_of(self.start(verb, order))

    def apply(self, *networks: HostNetwork, check_seconds: float = 5) -> dict[str, Any]:
        return self.act("apply", ApplyNetworks(host_id="h", networks=networks, check_seconds=check_seconds))

    def ping(self, address: str) -> bool:
        command = ["ip", "netns", "exec", self.name, "ping", "-c", "1", "-W", "2", address]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def snapshot(self) -> dict[str, Any]:
        """Everything that a change of the networks may touch, without what time changes."""
        found = {
            "links": self.ip("-d", "-j", "link"),
            "addresses": self.ip("-j", "addr"),
            "routes": self.ip("-j", "route", "show", "table", "all"),
            "routes6": self.ip("-j", "-6", "route", "show", "table", "all"),
        }
        volatile = {"operstate", "flags", "linkinfo", "valid_life_time", "preferred_life_time"}
        cleaned = _clean(found, volatile | {"ifindex", "tentative"})
        return {
            name: sorted(row for row in (json.dumps(r, sort_keys=True) for r in rows) if KERNELS not in row)
            for name, rows in cleaned.items()
        }

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


KERNELS = "<link-local>"
"""Rows about the link-local addresses that the kernel gives and takes by itself."""


def _clean(value: Any, volatile: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v, volatile) for k, v in value.items() if k not in volatile}
    if isinstance(value, list):
        rows = [_clean(v, volatile) for v in value]
        return [r for r in rows if not (isinstance(r, dict) and r.get("local") == KERNELS)]
    if isinstance(value, str) and value.startswith(("fe80::", "ff00::")):
        return KERNELS
    return value


def answer_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output)
    return answer


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


class World:
    """A switch (a bridge in a namespace of its own) with the control plane on it, and hosts plugged into it."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.prefix = f"vn{os.getpid() % 100000}x{time.monotonic_ns() % 10000}"
        self.switch = Namespace(f"{self.prefix}s", tmp_path)
        self.hosts: list[Namespace] = []
        ip("netns", "add", self.switch.name)
        self.switch.ip("link", "add", "sw", "type", "bridge")
        self.switch.ip("addr", "add", "10.77.0.254/24", "dev", "sw")
        self.switch.ip("link", "set", "sw", "up")
        self.server = self._serve(self.switch, "10.77.0.254")

    def _serve(self, host: Namespace, address: str) -> subprocess.Popen[bytes]:
        server = subprocess.Popen(
            ["ip", "netns", "exec", host.name, sys.executable, "-c", SERVER, address], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        return server

    @contextlib.contextmanager
    def server_at(self, host: Namespace, address: str) -> Iterator[None]:
        """A control plane at another place."""
        server = self._serve(host, address)
        try:
            yield
        finally:
            server.kill()
            server.communicate()

    def host(self) -> Namespace:
        number = len(self.hosts) + 1
        host = Namespace(f"{self.prefix}h{number}", self.tmp_path / f"h{number}", f"10.77.0.254:{PORT}")
        ip("netns", "add", host.name)
        self.hosts.append(host)
        self.switch.ip(
            *("link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        )
        self.switch.ip("link", "set", f"p{number}", "master", "sw", "up")
        host.ip("link", "set", "lo", "up")
        host.ip("link", "set", "eth0", "up")
        host.ip("addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        host.ip("addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")
        host.ip("route", "add", "default", "via", "10.77.0.254")
        host.ip("route", "add", "10.99.0.0/16", "via", "10.77.0.254", "metric", "50")
        host.ip("-6", "route", "add", "fd99::/64", "via", "fd77::fe")
        wait_until(lambda: not any("tentative" in json.dumps(a) for a in host.ip("-j", "addr")))
        return host

    def stop(self) -> None:
        self.server.kill()
        self.server.communicate()
        for host in (*self.hosts, self.switch):
            host.stop()


SERVER = f"""
import socket, sys
s = socket.create_server((sys.argv[1], {PORT})); print("ready", flush=True)
while True: s.accept()[0].close()
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def bridge(**fields: Any) -> HostNetwork:
    return HostNetwork(
        **{"network_id": new_id(), "name": "net", "kind": NetworkKind.BRIDGE, "bridge": "vb1", **fields}
    )


def vxlan(local: str, *peers: str) -> HostNetwork:
    return bridge(kind=NetworkKind.VXLAN, vni=77, local_address=local, peers=peers, mtu=1450)


def addresses(host: Namespace, device: str) -> set[str]:
    (link,) = host.ip("-j", "addr", "show", device)
    return {f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"}


def test_a_nic_goes_into_a_bridge_with_its_addresses_and_back(world: World) -> None:
    host = world.host()
    before = host.snapshot()
    network = bridge(nic="eth0")
    applied = host.apply(network)

    assert applied["ok"]["networks"] == [
        {"network_id": network.network_id, "bridge": "vb1", "in_sync": True, "problem": "", "link_down": ""}
    ]
    assert addresses(host, "vb1") == {"10.77.0.1/24", "fd77::1/64"}
    assert addresses(host, "eth0") == set()
    (link,) = host.ip("-j", "link", "show", "vb1")
    (nic,) = host.ip("-j", "link", "show", "eth0")
    assert link["address"] == nic["address"]
    assert nic["master"] == "vb1"
    assert link["ifalias"] == f"volery:test01:{network.network_id}"
    routes = {(r["dst"], r.get("gateway"), r["dev"]) for r in host.ip("-j", "route")}
    assert ("default", "10.77.0.254", "vb1") in routes
    assert ("10.99.0.0/16", "10.77.0.254", "vb1") in routes
    assert host.ping("10.77.0.254")
    again = host.snapshot()
    assert host.apply(network)["ok"]["networks"][0]["in_sync"]
    assert host.snapshot() == again

    assert host.apply() == {"ok": {"networks": []}}
    assert host.snapshot() == before
    assert host.ping("10.77.0.254")


def test_a_pulled_cable_is_noticed_and_so_is_the_bridge_that_is_gone(world: World) -> None:
    host = world.host()
    network = bridge(nic="eth0")
    assert host.apply(network)["ok"]["networks"][0]["link_down"] == ""
    watching = host.start("watch")
    assert watching.stdout is not None
    assert watching.stdout.readline() == b"watching\n"
    world.switch.ip("link", "set", "p1", "down")
    assert answer_of(watching) == {"ok": "changed"}
    (report,) = host.act("report")["ok"]
    assert report["in_sync"]
    assert report["link_down"] == "eth0 has no link: look at its cable and the switch's port"
    world.switch.ip("link", "set", "p1", "up")
    wait_until(lambda: host.act("report")["ok"][0]["link_down"] == "")
    watching = host.start("watch")
    assert watching.stdout is not None
    assert watching.stdout.readline() == b"watching\n"
    host.ip("link", "del", "vb1")
    assert answer_of(watching) == {"ok": "changed"}
    (report,) = host.act("report")["ok"]
    assert not report["in_sync"]


def test_vxlan_joins_two_hosts(world: World) -> None:
    first, second = world.host(), world.host()
    wanted = vxlan("")

    def network(local: str, *peers: str) -> HostNetwork:
        return msgspec.structs.replace(wanted, local_address=local, peers=peers)

    # as a full list of hosts: oneself is left out
    everybody = ("10.77.0.1", "10.77.0.2")
    for host, local in ((first, "10.77.0.1"), (second, "10.77.0.2")):
        assert host.apply(network(local, *everybody))["ok"]["networks"][0]["in_sync"]
        host.ip("addr", "add", f"192.168.9.{local[-1]}/24", "dev", "vb1")
    assert first.ping("192.168.9.2")
    assert second.ping("192.168.9.1")

    assert first.apply(network("10.77.0.1"))["ok"]["networks"][0]["in_sync"]
    assert "10.77.0.2" not in fdb(first)
    assert first.apply(network("10.77.0.1", *everybody))["ok"]["networks"][0]["in_sync"]
    assert fdb(first).count("10.77.0.2") == 1

    big = msgspec.structs.replace(network("10.77.0.1", *everybody), mtu=1500)
    report = first.apply(big)["ok"]["networks"][0]
    assert report["in_sync"]
    assert "1450" in report["problem"]


def fdb(host: Namespace) -> str:
    command = ["bridge", "-n", host.name, "fdb", "show"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return "\n".join(line for line in lines if line.startswith("00:00:00:00:00:00"))


def test_a_change_that_cuts_the_host_off_is_undone(world: World) -> None:
    """The control plane is behind the VXLAN network that the change takes away."""
    first, second = world.host(), world.host()
    network = vxlan("10.77.0.1", "10.77.0.2")
    assert "ok" in first.apply(network)
    assert "ok" in second.apply(
        msgspec.structs.replace(network, local_address="10.77.0.2", peers=("10.77.0.1",))
    )
    first.ip("addr", "add", "192.168.9.1/24", "dev", "vb1")
    first.ip("route", "add", "10.98.0.0/16", "via", "192.168.9.2")
    second.ip("addr", "add", "192.168.9.2/24", "dev", "vb1")
    first.control_plane = f"192.168.9.2:{PORT}"
    with world.server_at(second, "192.168.9.2"):
        before, entries = first.snapshot(), fdb(first)
        refused = first.apply(bridge(bridge="vb2", nic="eth0"), check_seconds=1.5)["refused"]
        assert refused["kind"] == "unavailable"
        assert refused["details"] == {"rolled_back": True}
        assert first.snapshot() == before
        assert fdb(first) == entries
        assert first.ping("192.168.9.2")
        (report,) = first.act("report")["ok"]
        assert (report["bridge"], report["in_sync"]) == ("vb1", True)
        assert "ok" in first.apply(network, bridge(bridge="vb2", nic="eth0"), check_seconds=5)


def test_an_agent_killed_in_the_middle_puts_everything_back_when_it_starts(world: World) -> None:
    host = world.host()
    before = host.snapshot()
    host.control_plane = "10.77.0.250:1"  # nobody: the change is never confirmed
    process = host.start(
        "apply", ApplyNetworks(host_id="h", networks=(bridge(nic="eth0"),), check_seconds=60)
    )
    wait_until(lambda: "vb1" in host.ip("link") and bool(addresses(host, "vb1")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert host.snapshot() != before
    assert host.act("restore") == {"ok": None}
    assert host.snapshot() == before
    assert host.act("report") == {"ok": []}


def test_killed_at_any_moment_it_is_one_or_the_other(world: World) -> None:
    """kill -9 at random moments of applying and restoring: the former networks, or the new ones, never a mixture."""
    host = world.host()
    before = host.snapshot()
    network = bridge(nic="eth0")
    order = ApplyNetworks(host_id="h", networks=(network,), check_seconds=10)
    for attempt in range(6):
        process = host.start("apply", order)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.35 + 0.03 * attempt)
        process.kill()
        process.wait()
        killed = host.start("restore")
        with contextlib.suppress(subprocess.TimeoutExpired):
            killed.wait(timeout=0.35 + 0.02 * attempt)
        killed.kill()
        killed.wait()
        assert host.act("restore") == {"ok": None}
        confirmed = host.act("report")["ok"]
        if confirmed:
            assert confirmed[0]["in_sync"]
            assert "ok" in host.apply()
        assert host.snapshot() == before


def test_what_a_reboot_took_is_made_again_without_a_control_plane(world: World) -> None:
    host = world.host()
    network = bridge(nic="eth0")
    assert "ok" in host.apply(network, bridge(bridge="vb2"))
    host.ip("addr", "flush", "dev", "vb1")
    host.ip("link", "del", "vb1")
    host.ip("link", "del", "vb2")
    host.ip("addr", "add", "10.77.0.1/24", "dev", "eth0")
    assert [r["in_sync"] for r in host.act("report")["ok"]] == [False, False]
    host.control_plane = "10.77.0.250:1"
    assert host.act("restore") == {"ok": None}
    assert [r["in_sync"] for r in host.act("report")["ok"]] == [True, True]
    assert addresses(host, "vb1") == {"10.77.0.1/24"}


def test_foreign_devices_are_left_alone(world: World) -> None:
    host = world.host()
    host.ip("link", "add", "vb1", "type", "bridge")
    host.ip("link", "add", "other", "type", "bridge")
    host.ip("link", "set", "other", "alias", f"volery:another:{new_id()}")
    host.ip("link", "add", "vxold", "type", "vxlan", "id", "5", "dstport", "4789", "local", "10.77.0.1")
    before = host.snapshot()
    refusals = {
        "isn't Volery's": bridge(),
        "no network device eth9": bridge(bridge="vb2", nic="eth9"),
        "VNI 5 is already used": bridge(
            bridge="vb2", kind=NetworkKind.VXLAN, vni=5, local_address="10.77.0.1"
        ),
        "isn't on this host": bridge(bridge="vb2", kind=NetworkKind.VXLAN, vni=6, local_address="10.1.1.1"),
        "can't be a bridge's name": bridge(bridge="a/b"),
        "MTU": bridge(bridge="vb2", mtu=70000),
        "needs a host device": bridge(bridge="vb2", vlan=7),
        "VLAN 4095": bridge(bridge="vb2", vlan=4095, nic="eth0"),
        "takes no host device": bridge(bridge="vb2", kind=NetworkKind.VXLAN, vni=6, nic="eth0"),
        "can't carry a network": bridge(bridge="vb2", nic="lo"),
    }
    for sentence, network in refusals.items():
        refused = host.apply(network)["refused"]
        assert sentence.replace("can't carry", "can carry") in refused["message"], refused
    assert host.apply()["ok"] == {"networks": []}
    assert host.snapshot() == before


def test_a_nic_in_somebody_elses_bridge_is_refused(world: World) -> None:
    host = world.host()
    host.ip("link", "add", "docker0", "type", "bridge")
    host.ip("link", "set", "eth0", "master", "docker0")
    before = host.snapshot()
    assert "belongs to docker0" in host.apply(bridge(nic="eth0"))["refused"]["message"]
    assert host.snapshot() == before


def test_a_kernel_without_vlans_says_so_and_changes_nothing(world: World) -> None:
    host = world.host()
    before = host.snapshot()
    features = host.act("features")["ok"]
    answer = host.apply(bridge(nic="eth0", vlan=100))
    assert "vxlan" in features
    if "vlan" in features:
        assert answer["ok"]["networks"][0]["in_sync"]
        assert "ok" in host.apply()
    else:
        assert answer["refused"]["kind"] == "unavailable"
        assert "vlan" in answer["refused"]["message"]
    assert host.snapshot() == before


def test_a_bridge_that_vms_use_stays(world: World) -> None:
    host = world.host()
    network = bridge()
    host.apply(network)
    host.ip("tuntap", "add", "vnet0", "mode", "tap")
    host.ip("link", "set", "vnet0", "master", "vb1")
    refused = host.apply()["refused"]
    assert refused["kind"] == "conflict"
    assert "vnet0" in refused["message"]
    assert host.apply(msgspec.structs.replace(network, mtu=1400))["ok"]["networks"][0]["in_sync"]
    (link,) = host.ip("-j", "link", "show", "vb1")
    assert link["mtu"] == 1400
    host.ip("link", "del", "vnet0")
    assert "ok" in host.apply()


def test_a_nic_moves_from_one_network_to_another(world: World) -> None:
    host = world.host()
    one, two = bridge(bridge="vb1", nic="eth0"), bridge(bridge="vb2")
    assert "ok" in host.apply(one, two)
    swapped = (msgspec.structs.replace(one, nic=""), msgspec.structs.replace(two, nic="eth0"))
    for order in (swapped, (one, two), tuple(reversed(swapped))):
        applied = host.apply(*order)["ok"]["networks"]
        assert all(r["in_sync"] for r in applied), applied
        holder = next(n.bridge for n in order if n.nic)
        assert addresses(host, holder) == {"10.77.0.1/24", "fd77::1/64"}
        assert host.ping("10.77.0.254")


def test_networks_that_clash_with_each_other_are_refused(world: World) -> None:
    host = world.host()
    for pair, what in (
        ((bridge(), bridge()), "bridge vb1"),
        ((bridge(nic="eth0"), bridge(bridge="vb2", nic="eth0")), "host device"),
        (
            (
                bridge(kind=NetworkKind.VXLAN, vni=9, local_address="10.77.0.1"),
                bridge(bridge="vb2", kind=NetworkKind.VXLAN, vni=9, local_address="10.77.0.1"),
            ),
            "VNI 9",
        ),
    ):
        assert what in host.apply(*pair)["refused"]["message"]


def test_two_orders_do_not_mix(world: World) -> None:
    host = world.host()
    orders = [
        ApplyNetworks(host_id="h", networks=(bridge(nic="eth0"),), check_seconds=5),
        ApplyNetworks(host_id="h", networks=(bridge(bridge="vb2", nic="eth0"),), check_seconds=5),
    ]
    answers = [answer_of(process) for process in [host.start("apply", order) for order in orders]]
    assert all("ok" in answer for answer in answers), answers
    (report,) = host.act("report")["ok"]
    assert report["in_sync"]
    assert sum(name in host.ip("link") for name in ("vb1", "vb2")) == 1
