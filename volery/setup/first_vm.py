"""The last steps of `make up`, over REST only: admin, defaults, this host, its image, one running VM.

Everything here is found before it is made, so it can be repeated. What the administrator removed or
changed afterwards stays as they want it: the first VM is made once.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from volery.cli.storage import send_image
from volery.client import api
from volery.client.request import Request, Resource, body_of
from volery.client.session import Session, save
from volery.client.transport import Client, NotOne, OperationFailed, ProblemError
from volery.contracts.account import IssuedToken, Login, Principal
from volery.contracts.base import Entity
from volery.contracts.cluster import Cluster, CreateCluster, CreateDataCenter
from volery.contracts.host import CreateHost, Host, HostStatus, HostToken, RenewHostToken
from volery.contracts.network import CreateNetwork, Network
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import Operation
from volery.contracts.storage import (
    CreateStorageDomain,
    Disk,
    DiskStatus,
    DomainKind,
    DomainStatus,
    StorageDomain,
)
from volery.contracts.vm import CreateVm, NewDisk, NewNic, Vm
from volery.setup import processes, programs, systemd
from volery.setup.console import Output
from volery.setup.errors import SetupError
from volery.setup.guest_image import GuestImage
from volery.setup.home import Home
from volery.setup.programs import Program
from volery.setup.up import LONGEST_UP_SECONDS, Running, start_programs

E = TypeVar("E", bound=Entity)

NAME = "Default"
"""Of data center, cluster, storage domain and network."""
IMAGE_DISK = "volery-guest"
FIRST = "first"
FIRST_MEMORY_BYTES = 192 * 2**20
TOKEN_SECONDS = 365 * 86400
_TOKEN_LEFT_SECONDS = 30 * 86400
"""root's token is replaced when less is left of it."""

NEEDED = frozenset({"inventory", "scheduler", "storage", "network"})
"""Services without which no VM starts."""

_READY_SECONDS = 60.0
_GRACE_SECONDS = 10.0
_HOST_SECONDS = 60.0
_DOMAIN_SECONDS = 60.0
_GUEST_SECONDS = 240.0
"""A guest that is emulated on a busy machine boots slowly."""
_POLL_SECONDS = 0.2


def finish(running: Running, output: Output) -> None:
    """Takes the installation from "its programs run" to "a VM runs". Raises SetupError."""
    home = running.home
    try:
        with processes.exclusive(home.run / "up.lock", timeout_seconds=LONGEST_UP_SECONDS):
            with output.step("Control plane answers"):
                _wait_until_ready(running, output)
            with _log_in(running) as client:
                vm = _local_host(client, running, output) if running.image is not None else None
    except (ProblemError, OperationFailed, NotOne, TimeoutError) as error:
        raise SetupError(
            f"{error}\nThe logs are in {home.log}. Run `make up` again to go on from here."
        ) from error
    _summary(running, vm, output)


def _wait_until_ready(running: Running, output: Output) -> None:
    """Until every service answers through the gateway; those that a VM can do without may be late."""
    home = running.home
    silent, said = NEEDED, "it doesn't listen yet"
    started = time.monotonic()
    with httpx.Client(base_url=running.gateway_url, verify=str(home.ca_certificate), timeout=5) as http:
        while time.monotonic() - started < _READY_SECONDS:
            try:
                answered = http.get("/readyz").json()["services"]
            except (httpx.TransportError, ValueError, KeyError) as error:
                said = str(error)
            else:
                silent = frozenset(n for n, ready in answered.items() if not ready) or NEEDED - set(answered)
                if not silent:
                    return
                said = f"{', '.join(sorted(silent))} don't answer"
                if not silent & NEEDED and time.monotonic() - started > _GRACE_SECONDS:
                    output.warn(f"{said} yet; going on without. {_last_words(home, programs.CONTROL_PLANE)}")
                    return
            time.sleep(_POLL_SECONDS)
    raise SetupError(
        f"the control plane isn't ready after {_READY_SECONDS:.0f} s: {said}."
        f" {_last_words(home, programs.CONTROL_PLANE)}"
    )


def _last_words(home: Home, program: Program) -> str:
    """Where the program logs and how its log ends."""
    if systemd.in_charge():
        place = f"`journalctl -u {systemd.unit(home, program.name)}`"
        tail = systemd.last_lines(home, program.name)
    else:
        log = program.log(home)
        place = str(log)
        tail = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
    return "\n  ".join([f"{place} ends:", *tail])


# --- who we are -----------------------------------------------------------------------------


def _log_in(running: Running) -> Client:
    """root on this machine, logged in; its token is kept where the command line finds it."""
    home = running.home
    path = home.secrets / "cli.json"
    known = Session(url=running.gateway_url, ca_file=str(home.ca_certificate))
    if path.exists():
        token = json.loads(path.read_text()).get("token", "")
        kept = Session(url=known.url, ca_file=known.ca_file, token=token)
        if _is_good(kept):
            save(kept, path)
            return Client(kept)
    login = Login(
        name="admin",
        password=home.admin_password.read_text().strip(),
        expires_seconds=TOKEN_SECONDS,
        description=f"root on {socket.gethostname()}",
    )
    with Client(known) as client:
        try:
            issued = client.send(Request("POST", "sessions", IssuedToken, body_of(login)))
        except ProblemError as error:
            if error.status not in (401, 403):
                raise
            raise SetupError(
                f"admin can't log in with the password in {home.admin_password}: {error} If it was"
                " changed, write the new one into that file and run `make up` again."
            ) from error
    session = Session(url=known.url, ca_file=known.ca_file, token=issued.secret)
    save(session, path)
    return Client(session)


def _is_good(session: Session) -> bool:
    if not session.token:
        return False
    with Client(session) as client:
        try:
            principal = client.send(Request("GET", "sessions/current", Principal))
        except ProblemError as error:
            if error.status in (401, 403):
                return False
            raise
    return principal.expires_at.timestamp() - time.time() > _TOKEN_LEFT_SECONDS


# --- this machine as a host ------------------------------------------------------------------


def _local_host(client: Client, running: Running, output: Output) -> Vm | None:
    assert running.image is not None
    home = running.home
    with output.step("Default data center and cluster"):
        center = _ensure(client, api.DATA_CENTERS, NAME, lambda: CreateDataCenter(name=NAME))
        cluster = _ensure(
            client, api.CLUSTERS, NAME, lambda: CreateCluster(name=NAME, data_center_id=center.id)
        )
    host = _host(client, home, cluster, output)
    with output.step("Default network") as step:
        network = _ensure(
            client,
            api.NETWORKS,
            NAME,
            lambda: CreateNetwork(name=NAME, data_center_id=center.id, kind=NetworkKind.NAT),
        )
        step.result = network.subnet
    domain = _storage_domain(client, home, host, center.id, output)
    if home.settings().get("VOLERY_SETUP_FIRST_VM"):
        return _find(client, api.VMS, FIRST)
    image = _image_disk(client, domain, running.image, output)
    vm = _first_vm(client, cluster, network, domain, image, output)
    home.change_settings({"VOLERY_SETUP_FIRST_VM": vm.id})
    return vm


def _host(client: Client, home: Home, cluster: Cluster, output: Output) -> Host:
    """This machine, enrolled and up."""
    name = socket.gethostname().split(".")[0]
    with output.step(f"Host {name}") as step:
        if not programs.is_enrolled(home):
            found = _find(client, api.HOSTS, name)
            if found is None:
                token = client.send(api.HOSTS.create(CreateHost(name=name, cluster_id=cluster.id), HostToken))
            else:
                # An earlier run ended between the two; its token was in memory only.
                ask = RenewHostToken(id=found.id)
                token = client.send(api.HOSTS.act(found.id, "enrolment-token", HostToken, ask))
            _enrol(home, token.enrolment_token)
        start_programs(home)
        host_id = json.loads((home.agent / "identity" / "identity.json").read_text())["enrolled"]["host_id"]

        def up() -> Host | None:
            host = client.send(api.HOSTS.get(host_id))
            step.progress(host.status)
            if host.status is HostStatus.NON_OPERATIONAL:
                raise SetupError(
                    f"this machine can't run virtual machines: {', '.join(host.reasons)}."
                    f" {_last_words(home, programs.HOST_AGENT)}"
                )
            settled = (HostStatus.UP, HostStatus.MAINTENANCE, HostStatus.PREPARING_FOR_MAINTENANCE)
            return host if host.status in settled else None

        host = _until(
            up, _HOST_SECONDS, lambda: f"host {name} to be up. {_last_words(home, programs.HOST_AGENT)}"
        )
        step.result = host.status
    return host


def _enrol(home: Home, token: str) -> None:
    environment = programs.load_environment(home) | {"VOLERY_AGENT_ENROLMENT_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-m", "host_agent", "enrol"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SetupError(f"this machine can't be enrolled as a host: {(done.stderr or done.stdout).strip()}")


def _storage_domain(client: Client, home: Home, host: Host, center: str, output: Output) -> StorageDomain:
    with output.step("Default storage domain") as step:
        domain = _find(client, api.STORAGE_DOMAINS, NAME)
        if domain is None:
            ask = CreateStorageDomain(
                name=NAME,
                kind=DomainKind.DIRECTORY,
                data_center_id=center,
                path=str(home.storage),
                host_id=host.id,
            )
            client.wait(client.send(api.STORAGE_DOMAINS.create(ask, Operation)))
            domain = client.find(api.STORAGE_DOMAINS, NAME)
        ident = domain.id

        def active() -> StorageDomain | None:
            now = client.send(api.STORAGE_DOMAINS.get(ident))
            settled = (DomainStatus.ACTIVE, DomainStatus.MAINTENANCE)
            return now if now.status in settled else None

        domain = _until(active, _DOMAIN_SECONDS, lambda: f"storage domain {NAME} to be active")
        step.result = f"{domain.available_bytes / 2**30:.0f} GiB free"
    return domain


def _image_disk(client: Client, domain: StorageDomain, image: GuestImage, output: Output) -> Disk:
    with output.step("Guest image in the storage domain"):
        found = _find(client, api.DISKS, IMAGE_DISK)
        if found is not None and found.status is DiskStatus.ILLEGAL:
            client.wait(client.send(api.DISKS.delete(found.id, Operation)))
            found = None
        if found is None or not found.sha256:
            if found is None:
                ask = {
                    "name": IMAGE_DISK,
                    "storage_domain_id": domain.id,
                    "size_bytes": _virtual_size(image.disk),
                    "description": "A few megabytes of Linux with a guest agent",
                }
                client.wait(client.send(api.DISKS.create(ask, Operation)))
                found = client.find(api.DISKS, IMAGE_DISK)
            send_image(client, found.id, image.disk)
            found = client.send(api.DISKS.get(found.id))
    return found


def _virtual_size(image: Path) -> int:
    program = shutil.which("qemu-img")
    if program is None:
        raise SetupError("qemu-img is missing: run `make up`, which installs it.")
    told = subprocess.run([program, "info", "--output=json", str(image)], capture_output=True, check=True)
    return int(json.loads(told.stdout)["virtual-size"])


def _first_vm(
    client: Client, cluster: Cluster, network: Network, domain: StorageDomain, image: Disk, output: Output
) -> Vm:
    with output.step(f"Virtual machine {FIRST}") as step:
        found = _find(client, api.VMS, FIRST)
        if found is None:
            ask = CreateVm(
                name=FIRST,
                cluster_id=cluster.id,
                memory_bytes=FIRST_MEMORY_BYTES,
                description="Made by make up",
                disks=(NewDisk(name=FIRST, storage_domain_id=domain.id, copy_of=image.id, boot_order=1),),
                nics=(NewNic(network_id=network.id),),
                start=True,
            )
            client.wait(client.send(api.VMS.create(ask, Operation)), timeout_seconds=_GUEST_SECONDS)
            found = client.find(api.VMS, FIRST)
        ident = found.id

        def told() -> Vm | None:
            vm = client.send(api.VMS.get(ident))
            step.progress(vm.status)
            return vm if vm.guest.hostname and _addresses(vm) else None

        vm = _until(
            told, _GUEST_SECONDS, lambda: f"the guest agent of {FIRST} to report a name and an address"
        )
        step.result = f"{vm.guest.hostname} at {', '.join(_addresses(vm))}"
    return vm


def _addresses(vm: Vm) -> list[str]:
    """What others reach it by: neither loopback nor link-local."""
    return [a for a in vm.guest.ip_addresses if not a.startswith(("127.", "::1", "fe80:"))]


# --- finding and waiting ---------------------------------------------------------------------


def _find(client: Client, resource: Resource[E], name: str) -> E | None:
    return next(iter(client.list(resource, filter={"name": name}, limit=2)), None)


def _ensure(client: Client, resource: Resource[E], name: str, ask: Callable[[], object]) -> E:
    found = _find(client, resource, name)
    if found is None:
        found = client.send(resource.create(ask()))  # type: ignore[arg-type]
    return found


def _until(look: Callable[[], E | None], seconds: float, what: Callable[[], str]) -> E:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise SetupError(f"waited {seconds:.0f} s for {what()}")
        time.sleep(_POLL_SECONDS)
    return found


def _summary(running: Running, vm: Vm | None, output: Output) -> None:
    home = running.home
    command = (
        "bin/volery" if (Path.cwd() / "bin" / "volery").exists() else programs.REPOSITORY / "bin" / "volery"
    )
    if home.path != Home.from_environment({}).path:
        command = f"VOLERY_HOME={home.path} {command}"
    output.say()
    output.say(f"Volery runs at {running.gateway_url}")
    if "VOLERY_SETUP_PASSWORD_SHOWN" not in home.settings():
        output.say(f"Log in as admin with the password {home.admin_password.read_text().strip()}")
        output.say(f"It isn't shown again; root finds it in {home.admin_password}")
        home.change_settings({"VOLERY_SETUP_PASSWORD_SHOWN": "yes"})
    if vm is not None:
        output.say(f"VM {vm.name} is {vm.status}" + "".join(f", {a}" for a in _addresses(vm)[:1]))
    output.say("Try:")
    for arguments in ("vm list", "events --follow", f"console {FIRST}"):
        output.say(f"  {command} {arguments}")
