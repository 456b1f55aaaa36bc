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
from lab import cgroups, stalls
from lab.commands import run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file on a file system of its own."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run(["mkfs.ext4", "-q", "-F", str(image)])
    run(["mount", "-o", "loop", str(image), str(mounted)])
    try:
        file_there = mounted / "file"
        file_there.write_bytes(bytes(8192))
        yield file_there
    finally:
        run(["umount", str(mounted)])


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
    words = f"read go; exec dd if=/dev/zero of={file} bs=4096 count=1 oflag=direct conv=notrunc status=none"
    process = subprocess.Popen(["sh", "-c", words], stdin=subprocess.PIPE)
    for hierarchy in cgroups.hierarchies():
        (hierarchy.mount_point / group / "cgroup.procs").write_text(str(process.pid))
    return process


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)  # the kernel announces no state of a process


def test_who_waits_for_the_disk_can_not_be_killed_until_it_is_let_go(disk: Path, group: str) -> None:
    number = disk.stat().st_dev
    stuck, well = writer(disk, f"{group}/guest"), writer(disk, "")
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
