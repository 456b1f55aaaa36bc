"""A blackout in the lab: both hosts, Volery, NATS and PostgreSQL are killed at one moment; one host comes back late."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lab import plane
from lab.scene import MIB, QUIET, Scene, staged
from volery.client import api
from volery.contracts.liveness import LivenessState
from volery.contracts.operation import Operation
from volery.contracts.vm import CreateVm, DesiredState, HighAvailability, NewDisk, Vm, VmStatus
from volery.setup import embedded, supervisor
from volery.setup.home import Home
from volery.setup.programs import PROGRAMS
from volery.setup.up import up

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def stage() -> Iterator[Scene]:
    with staged(2, {}, image=False) as scene:
        yield scene


def runs_on(stage: Scene, host: str, name: str, *, ha: bool, back: bool | None = None) -> Vm:
    """A VM with a disk on the shared storage, and no system on it."""
    shared = stage.client.find(api.STORAGE_DOMAINS, "shared")
    ask = CreateVm(
        name=name,
        cluster_id=stage.cluster.id,
        memory_bytes=64 * MIB,
        disks=(NewDisk(storage_domain_id=shared.id, size_bytes=16 * MIB),),
        high_availability=HighAvailability(enabled=ha),
        start_after_blackout=back,
    )
    vm_id = stage.client.wait(stage.client.send(api.VMS.create(ask, Operation))).object_id
    stage.act(vm_id, "start", {"host_id": stage.client.find(api.HOSTS, host).id})
    return stage.until(vm_id, lambda vm: vm.status is VmStatus.UP)


def plug_pulled(home: Home) -> None:
    """The control plane's machine: whoever would start the others again first."""
    programs = [supervisor.process(home), *(program.process(home) for program in PROGRAMS)]
    for process in [*programs, embedded.status(home, "nats"), embedded.status(home, "postgres")]:
        if process is not None:
            os.kill(process.pid, signal.SIGKILL)


def runs_anew(stage: Scene, vm: Vm, seconds: float) -> Vm:
    return stage.until(vm.id, lambda now: now.status is VmStatus.UP and now.epoch > vm.epoch, seconds)


def places(stage: Scene, vm: Vm) -> list[str]:
    """Hosts that have a domain of it."""
    on = [host for host in stage.lab.hosts if host.boot is not None]
    return [host.name for host in on if stage.domains(host, vm)]


def test_after_a_blackout_all_that_is_to_come_back_does_once(stage: Scene) -> None:
    first, late = stage.lab.hosts
    back = runs_on(stage, "h1", "back", ha=True)
    wanted = runs_on(stage, "h1", "wanted", ha=False, back=True)
    plain = runs_on(stage, "h1", "plain", ha=False)
    waits = runs_on(stage, "h2", "waits", ha=True)
    home = plane.home_of(stage.lab)
    plug_pulled(home)
    for host in stage.lab.hosts:
        host.power_off()
    first.power_on()
    assert stage.domains(first) == [], "a host starts nothing by itself"
    began = time.monotonic()
    up(home, QUIET)
    print(f"the control plane is back after {time.monotonic() - began:.1f} s")
    plane.until(lambda: plane.answers(stage.client), 60, "the gateway")
    for vm in (back, wanted):
        assert runs_anew(stage, vm, 90).host_id == back.host_id
    print(f"what ran on {first.name} runs again after {time.monotonic() - began:.1f} s")
    down_ = stage.client.send(api.VMS.get(plain.id))
    assert (down_.status, down_.desired) == (VmStatus.DOWN, DesiredState.DOWN)
    stage.until(waits.id, lambda now: now.status is VmStatus.UNKNOWN, 60)
    liveness = stage.client.send(api.LIVENESS.get(waits.host_id))
    assert liveness.state is LivenessState.NON_RESPONSIVE
    plane.until(
        lambda: stage.client.send(api.LIVENESS.get(waits.host_id)).fencing or None, 30, "why it is waited for"
    )
    assert places(stage, waits) == []
    late.power_on()
    runs_anew(stage, waits, 60)
    stage.host_is_up(waits.host_id)
    print(f"all of it after {time.monotonic() - began:.1f} s")
    assert [len(places(stage, vm)) for vm in (back, wanted, waits, plain)] == [1, 1, 1, 0]
