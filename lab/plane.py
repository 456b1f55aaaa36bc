"""The lab's own control plane: an installation without a local host, in which every lab host is enrolled over REST.

Afterwards there are a data center and a cluster, the shared directory and the iSCSI target as storage domains, a
network that spans the hosts, and the guest image as a disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lab.errors import LabError
from lab.host import Host
from lab.lab import Lab
from volery.client import api, session
from volery.client.request import Request, Resource, body_of
from volery.client.transport import Client
from volery.contracts.account import IssuedToken, Login
from volery.contracts.base import Entity
from volery.contracts.cluster import Cluster, CreateCluster, CreateDataCenter
from volery.contracts.host import CreateHost, HostStatus, HostToken
from volery.contracts.network import CreateNetwork
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import Operation
from volery.contracts.storage import CreateDisk, CreateStorageDomain, DomainKind, StorageDomain
from volery.setup import guest_image
from volery.setup.console import Output
from volery.setup.home import Home
from volery.setup.programs import REPOSITORY
from volery.setup.up import up

E = TypeVar("E", bound=Entity)

NAME = "Lab"
IMAGE = "volery-guest"
READY_SECONDS = 90.0


def home_of(lab: Lab) -> Home:
    """The installation of this lab's control plane."""
    return Home(lab.layout.state / "plane")


def connect(lab: Lab, output: Output, *, image: bool = True) -> Client:
    """Control plane, hosts, storage, network, image: what is missing of it. Repeatable. Raises LabError, SetupError.

    `image`: with the guest image, which takes longer than all the rest where it was never built.
    """
    home = home_of(lab)
    home.create()
    home.change_settings(
        {
            "VOLERY_SETUP_LOCAL_HOST": "no",
            "VOLERY_SETUP_PUBLIC_ADDRESS": lab.gateway,
            "VOLERY_SETUP_NAMES": lab.gateway,
        }
    )
    running = up(home, output)
    client = log_in(home, running.gateway_url)
    with output.step("Control plane answers"):
        until(
            lambda: client.http.get("/readyz").status_code == 200 or None, READY_SECONDS, "the control plane"
        )
    cluster = make_cluster(client)
    for host in lab.hosts:
        with output.step(f"Host {host.name}"):
            enrol(client, lab, host, cluster)
    make_storage(client, lab, cluster.data_center_id, output)
    with output.step("Network"):
        ensure(
            client,
            api.NETWORKS,
            "lab",
            lambda: CreateNetwork(name="lab", data_center_id=cluster.data_center_id, kind=NetworkKind.VXLAN),
        )
    if image:
        with output.step("Guest image"):
            make_image(client, home)
    return client


def log_in(home: Home, url: str) -> Client:
    """As the administrator; `bin/volery` with VOLERY_HOME of the plane is logged in as well."""
    unknown = session.Session(url=url, ca_file=str(home.ca_certificate))
    login = Login(name="admin", password=home.admin_password.read_text().strip(), description="lab")
    with Client(unknown) as client:
        until(lambda: answers(client), READY_SECONDS, "the gateway")
        issued = client.send(Request("POST", "sessions", IssuedToken, body_of(login)))
    known = session.Session(url=url, ca_file=str(home.ca_certificate), token=issued.secret)
    session.save(known, home.secrets / "cli.json")
    return Client(known)


def answers(client: Client) -> bool | None:
    import httpx

    try:
        return client.http.get("/readyz").status_code == 200 or None
    except httpx.TransportError:
        return None


def make_cluster(client: Client) -> Cluster:
    center = ensure(client, api.DATA_CENTERS, NAME, lambda: CreateDataCenter(name=NAME))
    return ensure(client, api.CLUSTERS, NAME, lambda: CreateCluster(name=NAME, data_center_id=center.id))


def enrol(client: Client, lab: Lab, host: Host, cluster: Cluster) -> None:
    """The host's agent runs with its own identity, and the host is up."""
    found = find(client, api.HOSTS, host.name)
    if found is None:
        made = client.send(api.HOSTS.create(CreateHost(name=host.name, cluster_id=cluster.id), HostToken))
        found = made.host
        host.install_agent(
            [sys.executable, "-m", "host_agent"], agent_environment(lab, host, made.enrolment_token)
        )
    ident = found.id

    def is_up() -> bool | None:
        now = client.send(api.HOSTS.get(ident))
        return now.status in (HostStatus.UP, HostStatus.MAINTENANCE) or None

    if host.boot is not None:
        host.start_agent()
        until(is_up, READY_SECONDS, f"host {host.name} to be up (its log is in {host.layout.directory})")


def agent_environment(lab: Lab, host: Host, token: str) -> dict[str, str]:
    return {
        "PYTHONPATH": str(REPOSITORY),
        "VOLERY_AGENT_STATE_DIR": str(host.home / "agent"),
        "VOLERY_AGENT_ENROLMENT_TOKEN": token,
        "VOLERY_AGENT_HYPERVISOR": "qemu",
        "VOLERY_AGENT_WATCHDOG_CLASS_PATH": str(host.layout.watchdog_class),
        "VOLERY_AGENT_DATA_ADDRESS": f"{host.ip}:0",
        "VOLERY_AGENT_MIGRATION_ADDRESS": host.ip,
        "VOLERY_AGENT_MIGRATION_LIBVIRT_URI": host.libvirt_uri,
        "VOLERY_AGENT_TUNNEL_ADDRESS": host.ip,
        "VOLERY_AGENT_DEVICE_SUFFIX": lab.name,
        "VOLERY_AGENT_DMI_UUID_PATH": str(host.layout.product_uuid),
        "VOLERY_AGENT_SHUTDOWN_MARK_PATH": str(host.layout.shutdown_mark),
        # A lab's storage answers at once or not at all.
        "VOLERY_AGENT_STORAGE_CHECK_SECONDS": "3",
        "VOLERY_AGENT_STORAGE_CHECK_TIMEOUT_SECONDS": "3",
        "VOLERY_AGENT_INSTALLATION": home_of(lab).installation,
    }


def make_storage(client: Client, lab: Lab, center: str, output: Output) -> None:
    target = lab.target
    wanted = [
        CreateStorageDomain(
            name="shared",
            kind=DomainKind.DIRECTORY,
            data_center_id=center,
            path=str(lab.shared_on_hosts),
            leases=False,  # whoever tries leases switches them on, with the io_timeout that it wants
        ),
        CreateStorageDomain(
            name="iscsi",
            kind=DomainKind.ISCSI,
            data_center_id=center,
            portal=target.portal,
            iqn=target.name,
            chap_user=target.user,
            chap_password=target.password,
        ),
    ]
    for ask in wanted:
        with output.step(f"Storage domain {ask.name}"):
            if find(client, api.STORAGE_DOMAINS, ask.name) is None:
                client.wait(client.send(api.STORAGE_DOMAINS.create(ask, Operation)))


def make_image(client: Client, home: Home) -> None:
    """The guest image as a disk of the shared domain, to be copied."""
    from volery.cli.storage import image_size, send_image

    found = find(client, api.DISKS, IMAGE)
    if found is not None and found.sha256:
        return
    built = guest_image.build(home)
    if found is None:
        domain: StorageDomain = client.find(api.STORAGE_DOMAINS, "shared")
        ask = CreateDisk(name=IMAGE, storage_domain_id=domain.id, size_bytes=image_size(built.disk))
        client.wait(client.send(api.DISKS.create(ask, Operation)))
        found = client.find(api.DISKS, IMAGE)
    send_image(client, found.id, Path(built.disk))


def find(client: Client, resource: Resource[E], name: str) -> E | None:
    return next(iter(client.list(resource, filter={"name": name}, limit=2)), None)


def ensure(client: Client, resource: Resource[E], name: str, ask: Callable[[], object]) -> E:
    found = find(client, resource, name)
    return found if found is not None else client.send(resource.create(ask()))  # type: ignore[arg-type]


def until(look: Callable[[], object | None], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
