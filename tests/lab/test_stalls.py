"""A host that is cut from a disk: who waits for it there can't be killed, others go on, and it ends when it is let go."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_agent import qemu_processes
from host_agent.killing import unkillable
from lab import cgroups, disk, stalls
from lab.commands import run
from lab.errors import LabError
from lab.host import Host
from lab.lab import Lab
from lab.layout import LabLayout
from lab.record import LabRecord


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file on a file system of its own."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as whole:
        whole.truncate(64 << 20)
    run(["mkfs.ext4", "-q", "-F", str(image)])
    run(["mount", "-o", "loop", str(image), str(mounted)])
    try:
        yield on_disk(mounted / "file")
    finally:
        run(["umount", str(mounted)])


def on_disk(file: Path) -> Path:
    """Written out: nobody waits for another's write then, but for blocks of the disk."""
    file.write_bytes(bytes(8192))
    run(["sync", str(file)])
    return file


@pytest.fixture
def group() -> Iterator[str]:
    """A control group below another, as a host's guests are."""
    top = f"volery-test-{uuid.uuid4().hex[:8]}"
    cgroups.create(f"{top}/guest")
    try:
        yield top
    finally:
        stalls.end(top)
        cgroups.remove(top)


def writer(file: Path, group: str) -> subprocess.Popen[bytes]:
    """Writes a block past the page cache, once it is in its group and told to."""
    process = subprocess.Popen(writing(file), stdin=subprocess.PIPE)
    join(group, process.pid)
    return process


def writing(file: Path) -> list[str]:
    dd = f"dd if=/dev/zero of={file} bs=4096 count=1 oflag=direct conv=notrunc status=none"
    return ["sh", "-c", f"read go; exec {dd}"]


def join(group: str, pid: int) -> None:
    for hierarchy in cgroups.hierarchies():
        (hierarchy.mount_point / group / "cgroup.procs").write_text(str(pid))


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)  # the kernel announces no state of a process


def test_who_waits_for_the_disk_can_not_be_killed_until_it_is_let_go(file: Path, group: str) -> None:
    number = file.stat().st_dev
    stuck, well = writer(file, f"{group}/guest"), writer(on_disk(file.with_name("other")), "")
    stalls.begin(group, f"{os.major(number)}:{os.minor(number)}")
    go(stuck)
    until(lambda: qemu_processes.waits(stuck.pid))
    assert not qemu_processes.is_killed(stuck.pid)
    os.kill(stuck.pid, signal.SIGKILL)
    assert qemu_processes.is_killed(stuck.pid)
    assert f"process {stuck.pid} on its host, was sent SIGKILL" in unkillable("vm", stuck.pid).message
    assert "can't be interrupted (1 in " in unkillable("vm", stuck.pid).message
    go(well)
    assert well.wait(20) == 0
    assert stuck.poll() is None
    stalls.end(group)
    assert stuck.wait(20) == -signal.SIGKILL
    assert not qemu_processes.is_killed(stuck.pid)


def test_without_a_stall_or_a_group_there_is_nothing_to_end(group: str) -> None:
    stalls.end(group)
    stalls.end("volery-test-nowhere")


def test_a_host_that_is_cut_from_the_labs_disk_can_lose_its_power(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    try:
        lab.up(2, with_disk=True)
        one, two = lab.host(1), lab.host(2)
        file, other = on_disk(lab.layout.disk / "file"), on_disk(lab.layout.disk / "other")
        process = subprocess.Popen(one.enter(writing(file)), stdin=subprocess.PIPE)
        until(lambda: one.pids("sh"))
        (pid,) = one.pids("sh")
        join(one.layout.cgroup, pid)
        disk.cut(one)
        go(process)
        until(lambda: qemu_processes.waits(pid))
        two.exec(["dd", "if=/dev/zero", f"of={other}", "bs=4096", "count=1", "oflag=direct", "conv=notrunc"])
        assert pid in one.pids("dd")
        one.power_off()
        process.wait(20)
        assert not one.pids()
        one.power_on()
        one.exec(["cat", str(file)])
    finally:
        lab.down()
    assert not lab.layout.disk.exists()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_a_lab_without_a_disk_has_none_to_cut(tmp_path: Path) -> None:
    host = Host(LabLayout(tmp_path, "none").host(1), LabRecord(name="none", subnet="10.98.1.0/24", kvm=False))
    with pytest.raises(LabError, match="has no disk: make it with `up --disk`"):
        disk.cut(host)
