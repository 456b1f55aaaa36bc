"""The lab's switch: one bridge in a network namespace of its own, one link from the machine into it.

The bridge is not in the machine's namespace, so that a firewall there (Docker's drops what bridges
forward) doesn't reach between hosts, and a lab leaves one link on the machine instead of one per host.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from typing import Any

from lab.commands import run
from lab.errors import LabError
from lab.layout import GATEWAY_OCTET, STORAGE_OCTET, HostLayout, LabLayout, address

BRIDGE = "br0"
UPLINK = "machine"  # the switch's end of the link to the machine


def ip(*arguments: str, namespace: str | None = None) -> str:
    prefix = ["ip", "-n", namespace] if namespace else ["ip"]
    return run([*prefix, *arguments])


def links(namespace: str | None = None) -> dict[str, dict[str, Any]]:
    """Links by name; an empty dict when the namespace doesn't exist."""
    if namespace is not None and namespace not in namespaces():
        return {}
    return {link["ifname"]: link for link in json.loads(ip("-j", "link", namespace=namespace))}


def namespaces() -> set[str]:
    """Names under /run/netns."""
    return {entry["name"] for entry in json.loads(ip("-j", "netns") or "[]")}


def ensure_switch(lab: LabLayout, subnet: str | None, pool: str) -> str:
    """Makes the switch what it should be, whatever part of it exists. Returns the lab's subnet.

    `subnet` is the recorded one, kept if it is still free; `pool` is where a new one is taken from.
    """
    if lab.switch not in namespaces():
        ip("netns", "add", lab.switch)
    if BRIDGE not in links(lab.switch):
        # An address of its own: otherwise it has that of some port, and changes it when hosts come and go, so that nobody
        # reaches storage and BMCs for seconds.
        ip("link", "add", BRIDGE, "address", _bridge_mac(lab), "type", "bridge", namespace=lab.switch)
    if lab.switch not in links():
        ip("link", "add", lab.switch, "type", "veth", "peer", "name", UPLINK, "netns", lab.switch)
    subnet = _claim_subnet(lab, subnet, pool)
    ip("link", "set", UPLINK, "master", BRIDGE, namespace=lab.switch)
    gateway, storage = address(subnet, GATEWAY_OCTET), address(subnet, STORAGE_OCTET)
    ip("address", "replace", f"{storage}/24", "dev", BRIDGE, namespace=lab.switch)
    # Promoted: the storage's address may go without taking those of the BMCs with it.
    settings = ("net.ipv4.ip_forward=0", "net.ipv4.conf.all.promote_secondaries=1")
    run(["ip", "netns", "exec", lab.switch, "sysctl", "-qw", *settings])
    for link in ("lo", BRIDGE, UPLINK):
        ip("link", "set", link, "up", namespace=lab.switch)
    ip("address", "replace", f"{gateway}/24", "dev", lab.switch)
    ip("link", "set", lab.switch, "up")
    return subnet


def _bridge_mac(lab: LabLayout) -> str:
    return "02:" + hashlib.sha256(lab.name.encode()).digest()[:5].hex(":")


def _claim_subnet(lab: LabLayout, recorded: str | None, pool: str) -> str:
    """The link carries its subnet as an alternative name, which the kernel lets only one link have.

    So two labs that start at the same moment can't take the same subnet, without a lock between them.
    """
    own = links()[lab.switch].get("altnames", [])
    for subnet in _candidates(lab, recorded, pool):
        claim = _claim_name(subnet)
        if claim in own:
            return subnet
        if _is_used(subnet):
            continue
        try:
            ip("link", "property", "add", "dev", lab.switch, "altname", claim)
        except LabError as error:
            if "exist" not in str(error):
                raise
            continue
        return subnet
    raise LabError(
        f"No /24 in {pool} is free for lab {lab.name}: take another lab down, or choose another range "
        "with --networks."
    )


def _claim_name(subnet: str) -> str:
    return "volery-lab-" + subnet.split("/")[0].rpartition(".")[0].replace(".", "-")


def _candidates(lab: LabLayout, recorded: str | None, pool: str) -> list[str]:
    everything = [str(network) for network in ipaddress.ip_network(pool).subnets(new_prefix=24)]
    start = int.from_bytes(hashlib.sha256(str(lab).encode()).digest()[:4]) % len(everything)
    ordered = everything[start:] + everything[:start]
    return [recorded, *ordered] if recorded else ordered


def _is_used(subnet: str) -> bool:
    """Whether the machine has a route into any part of this network, other than a default."""
    wanted = ipaddress.ip_network(subnet)
    for route in json.loads(ip("-j", "-4", "route", "show", "table", "all") or "[]"):
        destination = route.get("dst", "default")
        if destination == "default":
            continue
        network = ipaddress.ip_network(destination, strict=False)
        # A VPN splits its default route in halves; such a route is nobody's network.
        if network.prefixlen >= 8 and wanted.overlaps(network):
            return True
    return False


def set_cable(host: HostLayout, connected: bool) -> None:
    """Carrier of the host's eth0, by the switch's end of its cable. Harmless when the host is off."""
    if host.name in links(host.lab.switch):
        ip(
            "link", "set", host.name, "up" if connected else "down", namespace=host.lab.switch
        )  # fmt: skip


def set_storage(host: HostLayout, subnet: str, connected: bool) -> None:
    """Whether the switch takes what the host sends to the storage's address. It stays so over a power cycle."""
    table = f"ip storage_{host.name}"
    rules = [f"add table {table}", f"delete table {table}"]
    if not connected:
        own, storage = address(subnet, host.number), address(subnet, STORAGE_OCTET)
        rules += [
            f"add table {table}",
            f"add chain {table} in {{ type filter hook input priority 0; }}",
            f"add rule {table} in ip saddr {own} ip daddr {storage} drop",
        ]
    run(["ip", "netns", "exec", host.lab.switch, "nft", "; ".join(rules)])


def unplug(host: HostLayout) -> None:
    """Removes the host's port. Harmless when it's gone."""
    if host.name in links(host.lab.switch):
        run_ignoring_absence("link", "del", host.name, namespace=host.lab.switch)


def run_ignoring_absence(*arguments: str, namespace: str | None = None) -> None:
    """For removals: the kernel removes links of a dead namespace by itself, at its own time."""
    try:
        ip(*arguments, namespace=namespace)
    except LabError as error:
        if not any(word in str(error) for word in ("Cannot find", "No such", "does not exist")):
            raise


def remove_switch(lab: LabLayout) -> None:
    """Removes the bridge, the machine's link and every port. Harmless when they are gone."""
    if lab.switch in links():
        run_ignoring_absence("link", "del", lab.switch)
    if lab.switch in namespaces():
        run_ignoring_absence("netns", "del", lab.switch)
