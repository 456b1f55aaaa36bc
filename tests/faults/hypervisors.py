"""What libvirt itself says of the domains on every host, past all of our own code but the reading of their XML."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import libvirt

from host_agent.runningxml import disks_of, metadata_of, nics_of, parsed


@dataclass(frozen=True)
class Domain:
    """A domain of ours on one host."""

    vm_id: str
    host_id: str
    epoch: int
    running: bool
    """Its vCPUs execute."""
    paused: bool
    disks: frozenset[str]
    nics: Mapping[str, tuple[str, bool]]
    """NIC → MAC address, whether its link is up."""
    taps: Mapping[str, str]
    """Device on the host → the bridge that it must be in."""


def domains_on(host_id: str, uri: str) -> list[Domain]:
    """Those that Volery made, running or not. Raises libvirt.libvirtError."""
    connection = libvirt.open(uri)
    try:
        found = [_read(host_id, domain) for domain in connection.listAllDomains(0)]
    finally:
        connection.close()
    return [domain for domain in found if domain is not None]


def _read(host_id: str, domain: libvirt.virDomain) -> Domain | None:
    try:
        root = parsed(domain.XMLDesc(0))
        state, _ = domain.state()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
    metadata = metadata_of(root)
    if metadata is None:
        return None
    nics, taps = {}, {}
    for ident, device in nics_of(root).items():
        mac, link = device.element.find("mac"), device.element.find("link")
        assert mac is not None
        nics[ident] = (mac.get("address", ""), link is None or link.get("state") == "up")
        source = device.element.find("source")
        if device.target and source is not None:
            taps[device.target] = source.get("bridge", "")
    return Domain(
        vm_id=domain.UUIDString(),
        host_id=host_id,
        epoch=metadata.epoch,
        running=state == libvirt.VIR_DOMAIN_RUNNING,
        paused=state == libvirt.VIR_DOMAIN_PAUSED,
        disks=frozenset(disks_of(root)),
        nics=nics,
        taps=taps,
    )


def taps_in(enter: Sequence[str]) -> dict[str, str]:
    """Guests' devices in a host's network → the bridge that each is in. `enter` runs a command on the host."""
    listing = subprocess.run(
        [*enter, "ip", "-j", "-d", "link"], capture_output=True, text=True, check=True, timeout=20
    )
    return {
        link["ifname"]: link.get("master", "")
        for link in json.loads(listing.stdout)
        if link.get("linkinfo", {}).get("info_kind") == "tun"
    }
