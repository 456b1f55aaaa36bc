"""How this installation's own NATS and PostgreSQL are set up: identities, certificates, listening."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess

from volery.runtime.identity import Realm
from volery.runtime.permissions import OWNERS
from volery.setup import embedded
from volery.setup.embedded import Embedded, Launch, NatsOperator, NatsOptions, NatsTls
from volery.setup.home import Home
from volery.setup.pki import Authority

_EVERYWHERE = "0.0.0.0"  # noqa: S104 - agents on other hosts connect; TLS and their own keys guard it


def start_nats(home: Home) -> Embedded:
    """The bus with the installation's identities, in TLS, on every address unless settings say else."""
    return embedded.start_nats(home, nats_options(home))


def launch_nats(home: Home) -> Launch:
    return embedded.launch_nats(home, nats_options(home))


def nats_options(home: Home) -> NatsOptions:
    realm = Realm.create(home.bus_credentials)
    tls = NatsTls(home.pki / "nats.pem", home.pki / "nats.key", home.ca_certificate)
    return NatsOptions(
        host=home.settings().get("VOLERY_SETUP_BUS_ADDRESS", _EVERYWHERE),
        operator=NatsOperator(realm.operator_jwt, realm.system_account, realm.resolver_preload()),
        tls=tls,
        server_name=f"volery-{home.installation}",
    )


def start_postgres(home: Home) -> Embedded:
    return embedded.start_postgres(home)


def service_passwords(home: Home) -> dict[str, str]:
    """Each service's database password, made on first use."""
    return {service: home.secret(home.postgres_passwords / f"{service}.password") for service in OWNERS}


def ensure_certificates(home: Home) -> bool:
    """The authority, and certificates of bus and gateway for all of this machine's names.

    Whether any was made or renewed.
    """
    authority = Authority.open(home.pki, name=f"Volery {home.installation}")
    names, addresses = machine_names(home)
    issued = [authority.ensure(server, dns=names, addresses=addresses) for server in ("nats", "gateway")]
    return any(certificate.renewed for certificate in issued)


def renew_certificates(home: Home) -> bool:
    """Renews what is due, and lets a running bus read it; whether anything was renewed."""
    renewed = ensure_certificates(home)
    if renewed and embedded.status(home, "nats") is not None:
        start_nats(home)  # a live server is only told to read its files again
    return renewed


def machine_names(home: Home) -> tuple[list[str], list[str]]:
    """(DNS names, IP addresses) under which this machine is reached, and those that settings add."""
    names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
    addresses = {"127.0.0.1", "::1", *_own_addresses()}
    settings = home.settings()
    chosen = f"{settings.get('VOLERY_SETUP_NAMES', '')} {settings.get('VOLERY_SETUP_PUBLIC_ADDRESS', '')}"
    for extra in chosen.replace(",", " ").split():
        try:
            addresses.add(str(ipaddress.ip_address(extra)))
        except ValueError:
            names.add(extra.lower())
    return sorted(n for n in names if n and _is_dns(n)), sorted(addresses)


def public_address(home: Home) -> str:
    """Where other machines reach this one: settings.env's VOLERY_SETUP_PUBLIC_ADDRESS, else the
    address of the interface that leads outside, else loopback."""
    chosen = home.settings().get("VOLERY_SETUP_PUBLIC_ADDRESS")
    if chosen:
        return chosen
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: the kernel only chooses the route. 192.0.2.0/24 is for documentation.
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _is_dns(name: str) -> bool:
    return name.isascii() and all(part and len(part) < 64 for part in name.split("."))


def _own_addresses() -> list[str]:
    """Global addresses of real interfaces. Bridges of virtual networks come and go; they are left out."""
    listing = subprocess.run(
        ["ip", "-j", "address", "show", "up"], capture_output=True, text=True, check=False
    )
    if listing.returncode:
        return []
    found = []
    for link in json.loads(listing.stdout):
        if link.get("ifname", "").startswith(("virbr", "vnet", "veth", "docker", "podman", "cni")):
            continue
        found += [a["local"] for a in link.get("addr_info", []) if a.get("scope") == "global"]
    return found
