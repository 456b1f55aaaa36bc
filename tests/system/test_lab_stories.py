"""Stories in the lab, told through REST alone: several hosts, shared storage, iSCSI, live migration, faults."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent import pins, runningxml
from lab.board import Fault
from lab.scene import MIB, Scene, staged
from volery.client import api, licences
from volery.client.request import Request, body_of
from volery.client.transport import OperationFailed, ProblemError
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.liveness import HostLiveness, LivenessState, ProofKind
from volery.contracts.operation import Operation, OperationState
from volery.contracts.power import (
    ConfirmHostRebooted,
)
from volery.contracts.storage import CreateDisk
from volery.contracts.vm import Affinity, CreateVm, HighAvailability, MigrationPolicy, Vm, VmStatus

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def stage() -> Iterator[Scene]:
    # The least silence that ha accepts, and no hold for a control plane that has only just begun.
    hurried = {
        "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "35",
        "VOLERY_HA_START_HOLD_SECONDS": "5",
        "VOLERY_HA_SWITCH_QUIET_SECONDS": "1",
        "VOLERY_STORAGE_LOST_AFTER_SECONDS": "8",
        "VOLERY_STORAGE_BACK_AFTER_SECONDS": "3",
    }
    with staged(2, hurried) as scene:
        yield scene


def test_a_guest_migrates_while_it_counts(stage: Scene) -> None:
    vm = stage.guest("mover")
    first = int(stage.inside(vm, "tail -n 1 /run/tick"))
    done = stage.act(vm.id, "migrate")
    assert done.state is OperationState.SUCCEEDED
    moved = stage.client.send(api.VMS.get(vm.id))
    assert moved.host_id != vm.host_id
    assert moved.status is VmStatus.UP
    assert int(stage.inside(moved, "tail -n 1 /run/tick")) >= first
    boot = float(stage.inside(moved, "cut -d' ' -f1 /proc/uptime"))
    assert boot > 3, "it was not restarted"
    source = stage.host(vm.host_id)
    assert not stage.domains(source, vm)
    stage.remove(moved)


def bound(stage: Scene, vm: Vm) -> tuple[set[str], frozenset[int]]:
    """The CPU of each vCPU as libvirt has it on its host, and all that something of it may use."""
    host = stage.host(vm.host_id)
    (name,) = stage.domains(host, vm)
    shown = subprocess.run(host.enter(["virsh", "dumpxml", name]), capture_output=True, text=True, check=True)
    root = runningxml.parsed(shown.stdout)
    return {pin.get("cpuset", "") for pin in root.findall("cputune/vcpupin")}, pins.allowed(root)


def test_a_guest_with_a_cpu_of_its_own_takes_one_along_and_others_leave_it(stage: Scene) -> None:
    first, second = (stage.client.find(api.HOSTS, name).id for name in ("h1", "h2"))
    alone = stage.guest(
        "alone",
        cpu_pinning=CpuPinning(policy=PinningPolicy.DEDICATED),
        affinity=Affinity(preferred_host_ids=(first,)),
    )
    shares = stage.guest("shares", affinity=Affinity(preferred_host_ids=(second,)))
    assert (alone.host_id, shares.host_id) == (first, second)
    stage.act(alone.id, "migrate")
    moved = stage.client.send(api.VMS.get(alone.id))
    assert moved.host_id == second
    was, now = licences.all_of(stage.client, licences.asked(None, None, alone.id, ""))
    assert (was.host_id, now.host_id) == (first, second)
    assert was.until is not None
    assert bound(stage, moved) == ({str(now.cpus[0])}, frozenset(now.cpus))
    every = {cpu for core in stage.client.find(api.HOSTS, "h2").capabilities.cores for cpu in core.cpus}
    assert bound(stage, shares)[1] == every - set(now.cpus)

    stage.act(shares.id, "migrate")
    away = stage.client.send(api.VMS.get(shares.id))
    assert not bound(stage, away)[1] or bound(stage, away)[1] == every, "nobody has CPUs alone there"
    stage.act(shares.id, "migrate")
    back = stage.client.send(api.VMS.get(shares.id))
    assert back.host_id == second
    assert bound(stage, back)[1] == every - set(now.cpus)
    assert stage.inside(moved, "echo alive").strip() == "alive"
    stage.remove(moved)
    stage.wait(lambda: bound(stage, back)[1] == every, 20, lambda: "CPUs that nobody gives back")
    stage.remove(back)


def test_a_migration_is_cancelled_and_the_guest_stays(stage: Scene) -> None:
    vm = stage.guest("stayer")
    # 1 MiB/s needs minutes for its memory, so there is time to change one's mind.
    op = stage.client.send(
        api.VMS.act(vm.id, "migrate", Operation, {"bandwidth_mib_per_second": 1, "auto_converge": False})
    )
    stage.until(vm.id, lambda now: now.status is VmStatus.MIGRATING)
    until = time.monotonic() + 30
    while not any(s.name == "migrate" for s in stage.client.poll(op, 1).steps):
        assert time.monotonic() < until
    time.sleep(0.5)  # let libvirt's job begin: what is tested is cancelling it, not preventing it
    stage.client.send(Request("POST", f"operations/{op.id}/cancel", Operation, b"{}"))
    with pytest.raises(OperationFailed):
        stage.client.wait(op)
    now = stage.until(vm.id, lambda v: v.status is VmStatus.UP and not v.busy_with)
    assert now.host_id == vm.host_id
    assert now.epoch > vm.epoch + 1, "the source's epoch is above the destination's"
    assert stage.inside(now, "echo alive").strip() == "alive"
    other = next(h for h in stage.lab.hosts if h.number != stage.host(vm.host_id).number)
    assert not stage.domains(other, vm)
    stage.remove(now)


def test_disks_grow_and_come_and_go_while_it_runs(stage: Scene) -> None:
    vm = stage.guest("disks")
    disk = vm.disks[0]
    grow = api.DISKS.act(disk.disk_id, "resize", Operation, {"size_bytes": 256 * MIB})
    stage.client.wait(stage.client.send(grow))
    now = stage.client.send(api.VMS.get(vm.id))
    assert int(stage.inside(now, "cat /sys/class/block/vda/size").strip()) * 512 == 256 * MIB
    iscsi = stage.client.find(api.STORAGE_DOMAINS, "iscsi")
    ask = CreateDisk(name="lun", storage_domain_id=iscsi.id, size_bytes=64 * MIB)
    lun = stage.client.wait(stage.client.send(api.DISKS.create(ask, Operation))).object_id
    attach = Request("POST", f"vms/{vm.id}/disks", Operation, body_of({"disk_id": lun}))
    stage.client.wait(stage.client.send(attach))
    assert stage.inside(now, "ls /sys/class/block | grep -c '^vd[b-z]$'").strip() == "1"
    stage.inside(now, "echo written-by-guest > /dev/vdb; sync")
    stage.act(vm.id, "migrate")
    moved = stage.client.send(api.VMS.get(vm.id))
    assert stage.inside(moved, "head -c 16 /dev/vdb").startswith("written-by-guest")
    detach = Request("DELETE", f"vms/{vm.id}/disks/{lun}", Operation)
    stage.client.wait(stage.client.send(detach))
    assert stage.inside(moved, "ls /sys/class/block | grep -c '^vd[b-z]$'").strip() == "0"
    stage.client.wait(stage.client.send(api.DISKS.delete(lun, Operation)))
    stage.remove(moved)


def test_a_crashed_highly_available_guest_comes_back(stage: Scene) -> None:
    vm = stage.guest("survivor", high_availability=HighAvailability(enabled=True))
    host = stage.host(vm.host_id)
    (qemu,) = [
        pid for pid in host.pids("qemu-system-x86") if vm.id in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    subprocess.run(["kill", "-9", str(qemu)], check=True)
    crashed = time.monotonic()
    stage.until(vm.id, lambda now: now.status is not VmStatus.UP, 5)
    back = stage.until(vm.id, lambda now: now.status is VmStatus.UP and now.epoch > vm.epoch, 30)
    print(f"up again after {time.monotonic() - crashed:.1f} s")
    assert back.restarts == 1
    stage.until(vm.id, lambda now: now.guest.agent_connected, 90)
    stage.remove(back)


def test_a_host_that_is_shut_down_sends_its_guest_elsewhere_before_it_is_off(stage: Scene) -> None:
    """Its own agent says that the guest has ended: nobody waits for a proof that the host is dead."""
    vm = stage.guest("leaver", high_availability=HighAvailability(enabled=True))
    host = stage.host(vm.host_id)
    began = time.monotonic()
    host.power_down()
    off = time.monotonic()
    back = stage.until(vm.id, lambda now: now.status is VmStatus.UP and now.host_id != vm.host_id, 60)
    print(f"off after {off - began:.1f} s, runs elsewhere after {time.monotonic() - began:.1f} s")
    assert back.epoch > vm.epoch
    (restart,) = stage.client.list(api.RESTARTS, filter={"vm_id": vm.id})
    assert restart.reason == "host_shutdown"
    stage.until(vm.id, lambda now: now.guest.agent_connected, 90)
    host.power_on()
    stage.host_is_up(vm.host_id)
    assert not stage.domains(host, vm)
    stage.remove(back)


def test_maintenance_moves_everything_away(stage: Scene) -> None:
    vm = stage.guest("evacuee")
    request = api.HOSTS.act(vm.host_id, "maintenance", Operation, {"reason": "new memory"})
    stage.client.wait(stage.client.send(request))
    moved = stage.client.send(api.VMS.get(vm.id))
    assert moved.host_id != vm.host_id
    host = stage.client.send(api.HOSTS.get(vm.host_id))
    assert (host.status, host.maintenance_reason) == ("maintenance", "new memory")
    with pytest.raises(ProblemError) as refused:
        stage.client.send(api.VMS.act(vm.id, "migrate", Operation, {"host_id": moved.host_id}))
    assert refused.value.status == 409
    stage.client.wait(stage.client.send(api.HOSTS.act(vm.host_id, "activate", Operation)))
    stage.remove(moved)


def test_maintenance_names_who_may_not_move_and_moves_the_others(stage: Scene) -> None:
    host = stage.client.find(api.HOSTS, "h1")
    vms = []
    for name, allowed in (("first", True), ("pinned", False), ("second", True)):
        ask = CreateVm(
            name=name,
            cluster_id=stage.cluster.id,
            memory_bytes=64 * MIB,
            migration=MigrationPolicy(allowed=allowed),
        )
        vm_id = stage.client.wait(stage.client.send(api.VMS.create(ask, Operation))).object_id
        stage.act(vm_id, "start", {"host_id": host.id})
        vms.append(stage.client.send(api.VMS.get(vm_id)))
    op = stage.client.send(api.HOSTS.act(host.id, "maintenance", Operation))
    with pytest.raises(OperationFailed, match="pinned") as failed:
        stage.client.wait(op)
    assert "first" not in str(failed.value)
    assert stage.client.send(api.HOSTS.get(host.id)).status == "up"
    now = [stage.client.send(api.VMS.get(vm.id)) for vm in vms]
    assert [vm.host_id == host.id for vm in now] == [False, True, False]
    assert {vm.status for vm in now} == {VmStatus.UP}
    for vm in now:
        stage.remove(vm)


def test_maintenance_is_cancelled_and_so_is_the_move_under_way(stage: Scene) -> None:
    slow = MigrationPolicy(bandwidth_mib_per_second=1, auto_converge=False)
    vm = stage.guest("lingerer", migration=slow)
    op = stage.client.send(api.HOSTS.act(vm.host_id, "maintenance", Operation))
    stage.until(vm.id, lambda now: now.status is VmStatus.MIGRATING)
    stage.client.send(Request("POST", f"operations/{op.id}/cancel", Operation, b"{}"))
    with pytest.raises(OperationFailed):
        stage.client.wait(op)
    now = stage.until(vm.id, lambda v: v.status is VmStatus.UP and not v.busy_with)
    assert now.host_id == vm.host_id
    assert stage.client.send(api.HOSTS.get(vm.host_id)).status == "up"
    stage.remove(now)


def test_a_silent_host_is_noticed_and_nothing_of_it_is_started_elsewhere(stage: Scene) -> None:
    vm = stage.guest("patient", high_availability=HighAvailability(enabled=True))
    number = stage.host(vm.host_id).number
    host = stage.lab.host(number)
    host.cut()
    try:
        stage.until(vm.id, lambda now: now.status is VmStatus.UNKNOWN, 40)
        other = next(h for h in stage.lab.hosts if h.number != number)
        assert not stage.domains(other, vm)
    finally:
        host.join()
    back = stage.until(vm.id, lambda now: now.status is VmStatus.UP, 60)
    assert (back.host_id, back.epoch) == (vm.host_id, vm.epoch)
    stage.remove(back)


@pytest.fixture(scope="module")
def powered(stage: Scene) -> None:
    """Every host's BMC is known, and was tested."""
    for host in stage.lab.hosts:
        stage.manage_power(host.number)


@pytest.fixture(scope="module")
def survivor(stage: Scene, powered: None) -> Iterator[Vm]:
    """A highly available guest, on hosts whose BMCs were tested."""
    vm = stage.guest("phoenix", high_availability=HighAvailability(enabled=True))
    yield vm
    stage.remove(vm)


def restarted_elsewhere(stage: Scene, vm: Vm, seconds: float) -> tuple[Vm, HostLiveness]:
    """The VM runs on the other host, its disk and all, and nowhere else; with what is known of where it ran."""
    back = stage.until(
        vm.id,
        lambda now: now.status is VmStatus.UP and now.epoch > vm.epoch and now.host_id != vm.host_id,
        seconds,
    )
    return back, stage.client.send(api.LIVENESS.get(vm.host_id))


def test_a_host_whose_plug_is_pulled_is_dead_by_its_bmc_and_its_guest_is_back_elsewhere(
    stage: Scene, survivor: Vm
) -> None:
    vm = stage.client.send(api.VMS.get(survivor.id))
    host = stage.host(vm.host_id)
    host.power_off()
    pulled = time.monotonic()
    back, liveness = restarted_elsewhere(stage, vm, 90)
    print(f"runs elsewhere after {time.monotonic() - pulled:.1f} s")
    assert liveness.proof is not None
    assert (liveness.state, liveness.proof.kind) == (LivenessState.DEAD, ProofKind.BMC_OFF)
    assert back.status_reason != "crashed"
    records = list(stage.client.list(api.FENCE_RECORDS, filter={"host_id": vm.host_id}))
    assert [r for r in records if r.requested_by == "service:ha"] == []
    host.power_on()
    stage.host_is_up(vm.host_id)
    assert not stage.domains(host, vm)


def test_a_frozen_host_is_fenced_and_comes_back_without_its_guest(stage: Scene, survivor: Vm) -> None:
    vm = stage.client.send(api.VMS.get(survivor.id))
    host = stage.host(vm.host_id)
    boot = host.boot
    host.freeze()
    frozen = time.monotonic()
    _, liveness = restarted_elsewhere(stage, vm, 150)
    took = time.monotonic() - frozen
    print(f"runs elsewhere after {took:.1f} s")
    assert took >= 35
    assert liveness.proof is not None
    assert liveness.proof.kind is ProofKind.BMC_OFF
    stage.host_is_up(vm.host_id, 120)  # ha switched it on again
    assert host.boot != boot
    assert not stage.domains(host, vm)
    (record,) = stage.client.list(
        api.FENCE_RECORDS, filter={"host_id": vm.host_id, "requested_by": "service:ha"}
    )
    steps = [step.step for step in record.steps]
    assert steps.index("ordered_off") < steps.index("proven") < steps.index("ordered_on")


def test_with_power_and_bmc_gone_its_guest_waits_for_a_person(stage: Scene, survivor: Vm) -> None:
    vm = stage.client.send(api.VMS.get(survivor.id))
    number = stage.host(vm.host_id).number
    host, bmc = stage.lab.host(number), stage.lab.bmc(number)
    path = f"hosts/{vm.host_id}/confirm-rebooted"
    yes = ConfirmHostRebooted(id=vm.host_id, confirm=host.name, reason="burnt")
    with pytest.raises(ProblemError, match="sign of life"):
        stage.client.send(Request("POST", path, HostLiveness, body_of(yes)))
    bmc.set_fault(Fault.UNREACHABLE)
    host.power_off()
    try:
        stage.until(vm.id, lambda now: now.status is VmStatus.UNKNOWN, 60)

        def why() -> str:
            return stage.client.send(api.LIVENESS.get(vm.host_id)).fencing

        stage.wait(lambda: "its BMC can't be asked" in why(), 120, why)
        assert stage.client.send(api.VMS.get(vm.id)).status is VmStatus.UNKNOWN
        stage.client.send(Request("POST", path, HostLiveness, body_of(yes)))
        _, liveness = restarted_elsewhere(stage, vm, 90)
        assert liveness.proof is not None
        assert liveness.proof.kind is ProofKind.PERSON
    finally:
        bmc.set_fault(Fault.NONE)
        host.power_on()
    stage.host_is_up(vm.host_id)


def test_a_guest_with_a_lease_is_back_as_soon_as_a_bmc_has_proven_its_host_dead(
    stage: Scene, powered: None
) -> None:
    """Another host frees what the dead one held: nobody waits until its lease has expired."""
    shared = stage.hold_leases(2)
    vm = stage.guest("leased", high_availability=HighAvailability(enabled=True))
    assert vm.lease == shared.id
    host = stage.host(vm.host_id)
    host.power_off()
    off = time.monotonic()
    back, liveness = restarted_elsewhere(stage, vm, 180)
    took = time.monotonic() - off
    print(f"runs elsewhere after {took:.1f} s")
    assert liveness.proof is not None
    assert liveness.proof.kind is ProofKind.BMC_OFF
    assert took < 8 * 2 + 60, "before the lease had expired"
    (restart,) = stage.client.list(api.RESTARTS, filter={"vm_id": vm.id})
    assert restart.attempts == 1
    stage.until(back.id, lambda now: now.guest.agent_connected, 90)
    host.power_on()
    stage.host_is_up(vm.host_id)
    stage.hold_leases(2)  # its next boot has its number again
    stage.act(back.id, "migrate")
    back = stage.client.send(api.VMS.get(back.id))
    assert back.host_id == vm.host_id
    stage.remove(back)


def test_with_power_and_bmc_gone_an_expired_lease_brings_its_guest_back(stage: Scene, powered: None) -> None:
    shared = stage.hold_leases(2)
    vm = stage.guest("heir", high_availability=HighAvailability(enabled=True))
    assert vm.lease == shared.id
    stage.act(vm.id, "migrate")  # the lease moves along
    vm = stage.client.send(api.VMS.get(vm.id))
    number = stage.host(vm.host_id).number
    host, bmc = stage.lab.host(number), stage.lab.bmc(number)
    bmc.set_fault(Fault.UNREACHABLE)
    host.power_off()
    off = time.monotonic()
    try:
        back, liveness = restarted_elsewhere(stage, vm, 180)
        took = time.monotonic() - off
        print(f"runs elsewhere after {took:.1f} s")
        assert liveness.proof is not None
        assert liveness.proof.kind is ProofKind.LEASE_EXPIRED, liveness
        assert took > 8 * 2 + 60, "never before the watchdog's time"
        stage.until(vm.id, lambda now: now.guest.agent_connected, 90)
    finally:
        bmc.set_fault(Fault.NONE)
        host.power_on()
    stage.host_is_up(vm.host_id)
    assert not stage.domains(host, vm)
    stage.remove(back)
