"""The host agent's composition root: `python -m host_agent [run|enrol]`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop

from host_agent import (
    capabilities,
    chains,
    console,
    cpus,
    data_server,
    domains,
    enrolment,
    host_devices,
    intake,
    leases,
    luns,
    network,
    network_watch,
    storage,
    storage_watch,
    transfers,
    volumes,
)
from host_agent.action import Host
from host_agent.agent import Agent, Parts
from host_agent.capabilities import Describer
from host_agent.config import AgentConfig
from host_agent.enrolment import EnrolmentError, Identity, Unreachable
from host_agent.guest import watch_guests
from host_agent.hypervisor import Hypervisor
from host_agent.reports import Senses
from host_agent.solitude import AlreadyRunning
from host_agent.stats import Sampler
from host_agent.tickets import Tickets
from volery.contracts.agent import HostCapabilities
from volery.contracts.enrolment import EnrolmentToken, read_token
from volery.contracts.errors import Refused
from volery.runtime import config, telemetry

log = logging.getLogger("host_agent")

EXIT_CONFIG = 78
"""sysexits' EX_CONFIG: starting again won't help, a person must."""
EXIT_UNREACHABLE = 75
ENROL_AGAIN_SECONDS = 5.0
LOOK_SECONDS = 10.0

ACTIONS = (
    *domains.ACTIONS,
    *storage.ACTIONS,
    *volumes.ACTIONS,
    *chains.ACTIONS,
    *luns.ACTIONS,
    *leases.ACTIONS,
    *transfers.ACTIONS,
    *intake.ACTIONS,
    *console.ACTIONS,
    *network.ACTIONS,
)


async def serve_data(host: Host) -> None:
    """Images and consoles, over TLS only."""
    identity = enrolment.load(Path(host.config.state_dir))
    if identity is None or not identity.enrolled.certificate_pem:
        log.warning("this host got no certificate, so it serves no images and no consoles")
        return
    await data_server.serve(host)


PARTS = Parts(
    actions=ACTIONS,
    senses=Senses(
        Describer().describe,
        storage.report,
        network.report,
        luns.open_now,
        luns.claims,
        watch_storage=storage_watch.watch,
        watch_networks=network_watch.watch,
    ),
    sample=Sampler().sample,
    background=(watch_guests, serve_data, cpus.watch, host_devices.watch),
    restore=network.restore,
    prepare=capabilities.prepare,
)


def _token(settings: AgentConfig) -> EnrolmentToken:
    if not settings.enrolment_token:
        raise EnrolmentError(
            "this machine is not enrolled and has no token: make one with `volery host token` and set"
            " VOLERY_AGENT_ENROLMENT_TOKEN"
        )
    try:
        token = read_token(settings.enrolment_token)
    except ValueError as error:
        raise EnrolmentError(f"VOLERY_AGENT_ENROLMENT_TOKEN: {error}") from None
    if settings.control_plane_url:
        return EnrolmentToken(url=settings.control_plane_url, ca_sha256=token.ca_sha256, secret=token.secret)
    return token


async def look(settings: AgentConfig) -> HostCapabilities:
    """What this machine is, as far as it can be told now: its hardware id keeps it from being two hosts."""
    hypervisor = Hypervisor(settings)
    await hypervisor.start()
    try:
        await hypervisor.wait_connected(LOOK_SECONDS)
        return await Describer().describe(Host(settings, hypervisor, Tickets(), host_id=""))
    except Refused as problem:
        log.warning("enrolling without a look at the hypervisor: %s", problem.message)
        return HostCapabilities(hostname=socket.gethostname())
    finally:
        await hypervisor.close()


async def identify(settings: AgentConfig, *, patient: bool) -> Identity:
    """The stored identity, or a new one for the token. `patient`: waits for a control plane that is away."""
    state_dir = Path(settings.state_dir)
    while True:
        if (identity := enrolment.load(state_dir)) is not None:
            return identity
        try:
            return await enrolment.enrol(state_dir, _token(settings), await look(settings))
        except Unreachable as error:
            if not patient:
                raise
            log.warning("not enrolled yet: %s", error)
            await asyncio.sleep(ENROL_AGAIN_SECONDS)


async def run(settings: AgentConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    identity = await _or_stop(identify(settings, patient=True), stop)
    if identity is None:
        return 0
    return await Agent(settings, identity, PARTS).run(stop)


async def _or_stop(work: object, stop: asyncio.Event) -> Identity | None:
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        found: Identity = task.result()
        return found
    task.cancel()
    return None


async def enrol(settings: AgentConfig) -> int:
    identity = await identify(settings, patient=False)
    sys.stdout.write(f"host {identity.host_id} of installation {identity.enrolled.installation}\n")
    return 0


COMMANDS = {"run": run, "enrol": enrol}


def main(arguments: list[str]) -> int:
    """Returns the exit code; orders that still run are left as they are for the next run."""
    command = COMMANDS.get(arguments[0] if arguments else "run")
    if command is None or len(arguments) > 1:
        sys.stderr.write(f"usage: python -m host_agent [{'|'.join(COMMANDS)}]\n")
        return 64
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        config.refuse_unknown_sections()
        telemetry.configure("host_agent", config.read("VOLERY_TELEMETRY_", config.TelemetryConfig))
        return loop.run_until_complete(command(config.read("VOLERY_AGENT_", AgentConfig)))
    except Unreachable as error:
        log.error("%s", error)
        return EXIT_UNREACHABLE
    except (EnrolmentError, AlreadyRunning, config.ConfigError) as error:
        log.error("%s", error)
        return EXIT_CONFIG


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not sys.exit: cancelling what still runs would make actions clean up, and so touch VMs.
    os._exit(code)
