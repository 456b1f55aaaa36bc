"""What is done to a lab's host, and how it is mended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from lab import disk, plane, processes, watchdog
from lab.board import Fault
from lab.errors import LabError
from lab.host import Host
from lab.scene import QUIET, Scene
from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.fencing import PowerAction
from volery.contracts.host import HostStatus
from volery.contracts.operation import Operation
from volery.contracts.power import PowerSwitched, SwitchPower
from volery.contracts.vm import MigrationPolicy, Vm
from volery.runtime.clock import utc_now
from volery.setup import embedded, supervisor
from volery.setup.down import down
from volery.setup.programs import CONTROL_PLANE, PROGRAMS
from volery.setup.up import up

Act = Callable[[Scene, Host], None]
"""Does something to the host where the survivor runs, or to the control plane."""
ALONE_SECONDS = 30.0
"""A host that starts what is defined on it has done so within this."""
ORDERED_SECONDS = 60.0
"""A host that stands still is ordered off within this."""


def lose_all(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.UNREACHABLE)
    host.power_off()


def freeze_without_bmc(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.UNREACHABLE)
    host.freeze()


def freeze_without_watchdog(scene: Scene, host: Host) -> None:
    """Nothing on it moves, and nothing resets it."""
    host.freeze()
    host.layout.watchdog.write_bytes(watchdog.DISARM)


def freeze_and_kill_ha(scene: Scene, host: Host) -> None:
    """As soon as ha has written that the host is to be switched off."""
    since = utc_now()
    host.freeze()
    host_id = scene.client.find(api.HOSTS, host.name).id

    def ordered() -> bool:
        records = scene.client.list(api.FENCE_RECORDS, filter={"host_id": host_id})
        return any(step.step == "ordered_off" and step.at > since for r in records for step in r.steps)

    scene.wait(ordered, ORDERED_SECONDS, lambda: f"{host.name} to be ordered off")
    control_plane = CONTROL_PLANE.process(plane.home_of(scene.lab))
    assert control_plane is not None
    os.kill(control_plane.pid, signal.SIGKILL)  # its supervisor starts it again


def bring_back(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.NONE)
    if host.boot is None:
        host.power_on()
    else:
        host.thaw()


def thaw_then_bmc(scene: Scene, host: Host) -> None:
    """In this order: a BMC that works again, of a host that is still silent, is used to end it."""
    host.thaw()
    scene.host_is_up(scene.client.find(api.HOSTS, host.name).id, 90)
    scene.lab.bmc(host.number).set_fault(Fault.NONE)


def nothing(scene: Scene, host: Host) -> None:
    """It mends itself."""


def to_agent(number: signal.Signals) -> Act:
    def act(scene: Scene, host: Host) -> None:
        for pid in host.pids("agent"):
            os.kill(pid, number)

    return act


def to_servers(number: signal.Signals) -> Act:
    """NATS and PostgreSQL of the control plane."""

    def act(scene: Scene, host: Host) -> None:
        home = plane.home_of(scene.lab)
        for server in ("nats", "postgres"):
            process = embedded.status(home, server)
            if process is not None:
                os.kill(process.pid, number)

    return act


def next_to(scene: Scene, host: Host) -> Host:
    """Another host of the lab; also the one whose BMC a swapped one has."""
    return scene.lab.host(host.number % len(scene.lab.hosts) + 1)


def both(do: Callable[[Host], None]) -> Act:
    """To the survivor's host and the next."""

    def act(scene: Scene, host: Host) -> None:
        for one in (host, next_to(scene, host)):
            do(one)

    return act


def then(*acts: Act) -> Act:
    def act(scene: Scene, host: Host) -> None:
        for one in acts:
            one(scene, host)

    return act


def survivor_on(scene: Scene, host: Host) -> Vm:
    host_id = scene.client.find(api.HOSTS, host.name).id
    (vm,) = (
        vm for vm in scene.client.list(api.VMS) if vm.host_id == host_id and vm.name.startswith("survivor")
    )
    return vm


def in_the_middle(scene: Scene, host: Host, vm: Vm) -> None:
    """Until libvirt sends the VM's memory away."""
    (name,) = scene.domains(host, vm)

    def under_way() -> bool:
        return "Outgoing migration" in host.exec(["virsh", "-q", "domjobinfo", name]).stdout

    scene.wait(under_way, 60, lambda: f"VM {vm.name} to be on its way from {host.name}")


def begin_migration(scene: Scene, host: Host) -> None:
    """Of the survivor to the next host, slow enough to be broken in the middle."""
    vm = survivor_on(scene, host)
    target = scene.client.find(api.HOSTS, next_to(scene, host).name)
    slow = {"host_id": target.id, "bandwidth_mib_per_second": 1, "auto_converge": False}
    scene.client.send(api.VMS.act(vm.id, "migrate", Operation, slow))
    in_the_middle(scene, host, vm)


def begin_maintenance(scene: Scene, host: Host) -> None:
    """Of the survivor's host, whose guest moves slowly enough that it is there when the host breaks."""
    vm = survivor_on(scene, host)
    slow = MigrationPolicy(bandwidth_mib_per_second=1, auto_converge=False)
    scene.client.send(api.VMS.update(vm.id, {"migration": slow}))
    scene.client.send(api.HOSTS.act(vm.host_id, "maintenance", Operation))
    in_the_middle(scene, host, vm)


def lose_storage(scene: Scene, host: Host) -> None:
    """Until the host is non-operational by it; and for a while, in which nothing of it may be started elsewhere."""
    host.cut_storage()
    host_id = scene.client.find(api.HOSTS, host.name).id

    def is_left() -> bool:
        return scene.client.send(api.HOSTS.get(host_id)).status is HostStatus.NON_OPERATIONAL

    scene.wait(is_left, 150, lambda: f"{host.name} to be non-operational")
    time.sleep(ALONE_SECONDS)  # nothing is to come of it


def kill_qemu(scene: Scene, host: Host) -> None:
    """The survivor's."""
    vm = survivor_on(scene, host)
    for pid in qemus(host, vm):
        os.kill(pid, signal.SIGKILL)


def qemus(host: Host, vm: Vm) -> list[int]:
    return [pid for pid in host.pids("qemu-system-x86") if vm.id in processes.command_line(pid)]


def cut_directory(scene: Scene, host: Host) -> None:
    """From the shared directory with the ledgers. Returns when a write of the survivor's waits for it."""
    (pid,) = qemus(host, survivor_on(scene, host))
    disk.cut(host)

    def waits() -> bool:
        return any(thread is not None and thread.state == "D" for thread in processes.threads(pid))

    scene.wait(waits, 30, lambda: f"a write of QEMU {pid} on {host.name} to wait for its disk")


def kill_in_vain(scene: Scene, host: Host) -> None:
    """The survivor's QEMU, as the kernel does that is out of memory, while its write waits. It is there afterwards, and for
    a while, in which nothing of it may be started elsewhere."""
    cut_directory(scene, host)
    vm = survivor_on(scene, host)
    kill_qemu(scene, host)
    time.sleep(ALONE_SECONDS)  # nothing is to come of it
    if not qemus(host, vm):
        raise LabError(f"The QEMU of {vm.name} ended, though its write to the disk was held.")


def switch_off(scene: Scene, host: Host) -> None:
    """By a person, through Volery and its BMC."""
    found = scene.client.find(api.HOSTS, host.name)
    ask = SwitchPower(
        id=found.id, action=PowerAction.OFF, confirm=host.name, reason="its QEMU can't be ended"
    )
    scene.client.send(Request("POST", f"hosts/{found.id}/power", PowerSwitched, body_of(ask)))


def kill_plane(scene: Scene) -> None:
    """As if its machine lost its power: whoever would start the others again first."""
    home = plane.home_of(scene.lab)
    programs = [supervisor.process(home), *(program.process(home) for program in PROGRAMS)]
    for process in [*programs, embedded.status(home, "nats"), embedded.status(home, "postgres")]:
        if process is not None:
            os.kill(process.pid, signal.SIGKILL)


def end_maintenance(scene: Scene, host: Host) -> None:
    """Its operation ends by itself; what is left of it is a host that somebody has to activate."""
    host.power_on()
    for vm in scene.client.list(api.VMS):
        scene.client.send(api.VMS.update(vm.id, {"migration": MigrationPolicy()}))
    host_id = scene.client.find(api.HOSTS, host.name).id

    def ended() -> bool:
        asked = scene.client.list(api.OPERATIONS, filter={"object_id": host_id, "kind": "host.maintain"})
        return all(operation.ended_at for operation in asked)

    scene.wait(ended, 120, lambda: f"the maintenance of {host.name} to end")
    if scene.client.send(api.HOSTS.get(host_id)).status is HostStatus.MAINTENANCE:
        scene.client.wait(scene.client.send(api.HOSTS.act(host_id, "activate", Operation)))


def power_on_alone(scene: Scene, host: Host) -> None:
    """With its domains still defined, and nobody there to say that they run elsewhere by now."""
    stop_plane(scene, host)
    host.power_on()
    host.start_agent()
    time.sleep(ALONE_SECONDS)  # nothing is to come of it
    start_plane(scene, host)


def stop_plane(scene: Scene, host: Host) -> None:
    down(plane.home_of(scene.lab), QUIET)


def start_plane(scene: Scene, host: Host) -> None:
    up(plane.home_of(scene.lab), QUIET)
    plane.until(lambda: plane.answers(scene.client), 90, "the gateway")


def bmc(fault: Fault) -> Act:
    return lambda scene, host: scene.lab.bmc(host.number).set_fault(fault)
