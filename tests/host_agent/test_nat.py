"""NAT networks by a real libvirtd, and the choice of their subnets."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from host_agent import nat
from host_agent.netlink import Address, Kernel, Link, Route
from tests.support.libvirt_host import LibvirtHost
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.contracts.network_orders import ApplyNetworks, HostNetwork, NetworkKind

ROOT = Path(__file__).resolve().parents[2]


def network(**fields: Any) -> HostNetwork:
    defaults = {"network_id": new_id(), "name": "nat", "kind": NetworkKind.NAT, "bridge": "vnat0"}
    return HostNetwork(**{**defaults, **fields})


def act(host: LibvirtHost, state_dir: Path, verb: str, *networks: HostNetwork) -> Any:
    order = ApplyNetworks(host_id="h", networks=networks, check_seconds=5)
    program = [sys.executable, "-m", "tests.support.network_program", verb, str(state_dir), "", host.uri]
    done = subprocess.run(
        ["nsenter", "-t", str(host.init_pid), "-a", *program],
        input=msgspec.json.encode(order),
        capture_output=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    return json.loads(done.stdout)


@pytest.mark.timeout(180)
def test_a_nat_network_leases_addresses_and_goes_away(libvirt_host: LibvirtHost, tmp_path: Path) -> None:
    wanted = network(subnet="192.168.201.0/24", mtu=1400)
    try:
        (report,) = act(libvirt_host, tmp_path, "apply", wanted)["ok"]["networks"]
        assert (report["in_sync"], report["problem"]) == (True, "")
        (link,) = json.loads(libvirt_host.run("ip", "-j", "addr", "show", "vnat0"))
        assert link["addr_info"][0]["local"] == "192.168.201.1"
        assert link["mtu"] == 1400
        assert leased(libvirt_host, "vnat0") in ipaddress.ip_network("192.168.201.0/24")
        assert act(libvirt_host, tmp_path, "apply", wanted)["ok"]["networks"][0]["in_sync"]

        clash = network(bridge="vnat1", subnet="192.168.201.128/25")
        refused = act(libvirt_host, tmp_path, "apply", wanted, clash)["refused"]
        assert refused["kind"] == "conflict"
        assert "192.168.130.0/24 is free" in refused["message"]

        free = msgspec.structs.replace(clash, subnet="")
        reports = act(libvirt_host, tmp_path, "apply", wanted, free)["ok"]["networks"]
        assert all(r["in_sync"] for r in reports)
        moved = msgspec.structs.replace(wanted, subnet="192.168.202.0/24")
        assert all(r["in_sync"] for r in act(libvirt_host, tmp_path, "apply", moved, free)["ok"]["networks"])
        assert leased(libvirt_host, "vnat0") in ipaddress.ip_network("192.168.202.0/24")

        # lost, as by a reboot: made again at the agent's start
        libvirt_host.run(
            "virsh", "-c", libvirt_host.uri, "net-destroy", nat.network_name("test01", wanted.network_id)
        )
        assert [r["in_sync"] for r in act(libvirt_host, tmp_path, "report")["ok"]] == [False, True]
        assert act(libvirt_host, tmp_path, "restore") == {"ok": None}
        assert [r["in_sync"] for r in act(libvirt_host, tmp_path, "report")["ok"]] == [True, True]
    finally:
        assert act(libvirt_host, tmp_path, "apply")["ok"] == {"networks": []}
    names = libvirt_host.run("virsh", "-c", libvirt_host.uri, "net-list", "--all", "--name")
    assert "volery" not in names
    assert "vnat" not in libvirt_host.run("ip", "link")


def leased(host: LibvirtHost, bridge: str) -> ipaddress.IPv4Address:
    """The address that a guest gets by DHCP, and that its host then reaches."""
    guest = "guestns"
    host.run("ip", "netns", "add", guest)
    try:
        host.run("ip", "link", "add", "veg", "type", "veth", "peer", "name", "eth0", "netns", guest)
        host.run("ip", "link", "set", "veg", "master", bridge, "up")
        script = 'ip addr add "$ip/$mask" dev "$interface" 2>/dev/null; echo "LEASE $ip" >&2; true'
        client = f"ip link set eth0 up; printf '#!/bin/sh\\n%s\\n' '{script}' > /tmp/vlease; chmod +x /tmp/vlease; "
        client += "busybox udhcpc -i eth0 -n -q -f -s /tmp/vlease -t 10 -T 1 2>&1; rm -f /tmp/vlease"
        said = host.run("ip", "netns", "exec", guest, "sh", "-c", client)
        address = said.split("LEASE ")[-1].split()[0]
        host.run("ping", "-c", "1", "-W", "3", address)
        return ipaddress.IPv4Address(address)
    finally:
        host.run("ip", "netns", "del", guest)


KERNEL = Kernel(
    links=(Link(name="eth0"), Link(name="vnat0", kind="bridge")),
    addresses=(
        Address(link="eth0", address="192.168.130.7", prefix=24, family=2),
        Address(link="vnat0", address="10.9.0.1", prefix=24, family=2),
        Address(link="eth0", address="fd00::1", prefix=64, family=10),
    ),
    routes=(
        Route(link="eth0", family=2),
        Route(link="eth0", family=2, destination="10.8.0.0", prefix=16),
        Route(link="eth0", family=10, destination="fd01::", prefix=64),
    ),
)


def test_a_free_subnet_is_found() -> None:
    assert str(nat.subnet(network(), KERNEL)) == "192.168.131.0/24"
    assert str(nat.subnet(network(subnet="10.9.0.0/24"), KERNEL)) == "10.9.0.0/24", "its own bridge's"


@pytest.mark.parametrize(
    ("subnet", "reason"),
    [
        ("192.168.130.0/25", "overlaps with 192.168.130.0/24"),
        ("10.0.0.0/8", "overlaps with"),
        ("10.8.200.0/24", "overlaps with 10.8.0.0/16"),
        ("192.168.7.1/24", "isn't an IPv4 network"),
        ("fd00::/64", "isn't an IPv4 network"),
        ("nonsense", "isn't an IPv4 network"),
        ("192.168.7.0/31", "no room"),
        ("0.0.0.0/0", "no room"),
    ],
)
def test_subnets_that_do_not_fit_are_refused(subnet: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        nat.subnet(network(subnet=subnet), KERNEL)


def test_names_in_the_xml_are_only_text() -> None:
    odd = network(name="<x/>&", bridge="b'\"<")
    xml = nat.network_xml(odd, "volery-<x>", ipaddress.ip_network("10.0.0.0/29"))
    assert nat.described(xml) == ("b'\"<", "10.0.0.0/29", 1500)


def test_networks_of_another_installation_are_not_ours() -> None:
    ours = nat.network_name("abc", new_id())
    assert nat.is_own(ours, "abc")
    assert not nat.is_own(ours, "")
    assert not nat.is_own(ours, "ab")
    assert not nat.is_own("default", "abc")
    assert not nat.is_own("volery-abc-mine", "abc")
