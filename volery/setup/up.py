"""`make up`: everything in order, each step repeatable; a second run changes nothing that is right."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from volery.runtime.identity import Realm
from volery.runtime.permissions import OWNERS
from volery.setup import (
    guest_image,
    kvm,
    libvirt_daemons,
    processes,
    programs,
    servers,
    settings,
    supervisor,
    systemd,
)
from volery.setup.console import Output
from volery.setup.database import bootstrap_database
from volery.setup.embedded import Embedded
from volery.setup.errors import SetupError
from volery.setup.guest_image import GuestImage
from volery.setup.home import Home
from volery.setup.programs import Decided

GATEWAY_PORT = 8443
LONGEST_UP_SECONDS = 600.0


@dataclass(frozen=True)
class Running:
    """What stands when the programs have been started."""

    home: Home
    gateway_url: str
    image: GuestImage | None
    """None where this machine isn't a host itself."""


def up(home: Home, output: Output) -> Running:
    """Sets the installation up and starts it. Raises SetupError saying what to do."""
    require_root()
    with output.step(f"State directory {home.path}"):
        home.create()
        settings.take(home)
    with (
        processes.exclusive(home.run / "up.lock", timeout_seconds=LONGEST_UP_SECONDS),
        ThreadPoolExecutor(1, thread_name_prefix="guest-image") as pool,
    ):
        if not programs.has_local_host(home):
            return Running(home, _start(home, output), None)
        # The image takes longest and needs nothing of the rest.
        image = pool.submit(guest_image.build, home)
        url = _start(home, output)
        return Running(home, url, _finish_image(image, output))


def require_root() -> None:
    if os.geteuid() != 0:
        raise SetupError(
            "setting up an installation needs root: it talks to this machine's libvirt and makes"
            " bridges. Run `sudo make up`, or as root."
        )


def _start(home: Home, output: Output) -> str:
    with output.step("Certificates and identities") as step:
        renewed = servers.ensure_certificates(home)
        Realm.create(home.bus_credentials)
        step.result = "" if renewed else "unchanged"
    bus, database = _servers(home, output)
    with output.step("Database roles and schemas"):
        asyncio.run(bootstrap_database(database.dsn, OWNERS, servers.service_passwords(home)))
    hypervisor = "auto"
    if programs.has_local_host(home):
        hypervisor = _hypervisor(home, output)
        with output.step("libvirt") as step:
            step.result = libvirt_daemons.ensure()
    port = _gateway_port(home)
    sockets = database.socket_directory
    assert sockets is not None
    home.secret(home.admin_password, size_bytes=15)
    decided = Decided(bus.url, sockets, port, servers.public_address(home), hypervisor)
    derived = programs.derived_environment(home, decided)
    programs.save_environment(home, programs.environment(home, derived))
    with output.step("Control plane") as step:
        step.result = start_programs(home)
    return f"https://127.0.0.1:{port}"


def start_programs(home: Home) -> str:
    """Starts what can be started, and anew what would run differently; says by whom it is kept."""
    if systemd.in_charge():
        systemd.start_programs(home)
        return "kept running by systemd"
    return f"kept running by process {supervisor.start(home).pid}"


def _servers(home: Home, output: Output) -> tuple[Embedded, Embedded]:
    if systemd.in_charge():
        with output.step("systemd units"):
            systemd.start_servers(home)
    with output.step("PostgreSQL") as step:
        database = servers.start_postgres(home)
        step.result = _told(database)
    with output.step("NATS") as step:
        bus = servers.start_nats(home)
        step.result = _told(bus)
    return bus, database


def _told(server: Embedded) -> str:
    return f"process {server.pid}" + (", already running" if server.adopted else "")


def _hypervisor(home: Home, output: Output) -> str:
    changed = kvm.repair_device()
    if changed:
        output.say(f"     {changed}")
    with output.step("Hardware virtualization") as step:
        found = kvm.probe(home)
        step.result = "KVM works" if found.works else "not usable"
    if not found.works:
        output.warn(found.reason)
    return "kvm" if found.works else "qemu"


def _gateway_port(home: Home) -> int:
    """The port of settings.env (`VOLERY_SETUP_GATEWAY_PORT`), else a free one that is kept there."""
    kept = home.settings().get("VOLERY_SETUP_GATEWAY_PORT", "")
    if kept.isdigit():
        return int(kept)
    port = processes.free_port(GATEWAY_PORT)
    home.change_settings({"VOLERY_SETUP_GATEWAY_PORT": str(port)})
    return port


def _finish_image(image: Future[GuestImage], output: Output) -> GuestImage:
    with output.step("Guest image") as step:
        built = image.result()
        step.result = f"kernel {built.kernel_version}" + ("" if built.built else ", unchanged")
    return built
