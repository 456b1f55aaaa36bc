"""Children end: at their deadline, when they are cancelled, with the agent, and when they take too much."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from host_agent import children
from host_agent.children import ChildFailed, ChildTimedOut, Limits
from volery.contracts.errors import Kind, Refused

PYTHON = sys.executable


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)


async def test_output_input_and_reason() -> None:
    assert await children.run(["cat"], timeout_seconds=5, stdin=b"x" * 300_000) == b"x" * 300_000
    with pytest.raises(ChildFailed, match="first; second") as failed:
        await children.run(["sh", "-c", "echo first >&2; echo second >&2; exit 3"], timeout_seconds=5)
    assert failed.value.status == 3
    assert (await children.run(["sh", "-c", "echo $LC_ALL"], timeout_seconds=5)) == b"C\n"
    with pytest.raises(ChildFailed) as failed:
        await children.run(["sh", "-c", "yes | head -c 100000 >&2; exit 1"], timeout_seconds=5)
    assert len(failed.value.reason) <= 500


async def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(Refused, match="no program qemu-imgg: install it") as refused:
        await children.run(["qemu-imgg", "info"], timeout_seconds=5)
    assert refused.value.kind is Kind.UNAVAILABLE


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "])
async def test_a_deadline_ends_the_child_and_its_children(tmp_path: Path, stubborn: str) -> None:
    pids = tmp_path / "pids"
    script = f"{stubborn}sleep 60 & echo $$ $! > {pids}; wait; wait"
    started = asyncio.get_running_loop().time()
    with pytest.raises(ChildTimedOut, match=r"within 0\.5 s"):
        await children.run(["sh", "-c", script], timeout_seconds=0.5)
    assert asyncio.get_running_loop().time() - started < 5
    for pid in map(int, pids.read_text().split()):
        await until_dead(pid)


async def test_a_cancelled_order_takes_its_child_along(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(
        children.run(
            ["sh", "-c", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 60"],
            timeout_seconds=60,
        )
    )
    async with asyncio.timeout(10):
        while not pid_file.exists():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_dead(int(pid_file.read_text()))


async def test_a_child_dies_with_the_agent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import asyncio\nfrom host_agent import children\n"
        "from host_agent.children import Limits\n"
        f"asyncio.run(children.run(['sh', '-c', 'echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 60'],"
        " timeout_seconds=60, limits=Limits(10, 1 << 30)))"
    )
    agent = subprocess.Popen([PYTHON, "-c", program], env={**os.environ, "PYTHONPATH": children.PACKAGES})
    async with asyncio.timeout(20):
        while not pid_file.exists():
            await asyncio.sleep(0.01)
    pid = int(pid_file.read_text())
    assert alive(pid)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    await until_dead(pid)


async def test_bounds_on_cpu_time_and_memory() -> None:
    limits = Limits(cpu_seconds=1, address_space_bytes=256 * 1024**2)
    with pytest.raises(ChildFailed, match="CPU time"):
        await children.run([PYTHON, "-S", "-c", "while True: pass"], timeout_seconds=30, limits=limits)
    with pytest.raises(ChildFailed, match="MemoryError"):
        await children.run(
            [PYTHON, "-S", "-c", "import time; time.sleep(0.2); b'x' * (512 << 20)"],
            timeout_seconds=30,
            limits=limits,
        )


async def test_a_bounded_child_has_few_capabilities(tmp_path: Path) -> None:
    """dac_override, dac_read_search, fowner and chown: files as root, nothing else."""
    limits = Limits(cpu_seconds=5, address_space_bytes=1 << 30)
    status = await children.run(["grep", "^Cap", "/proc/self/status"], timeout_seconds=5, limits=limits)
    effective = int(dict(line.split(b":\t") for line in status.splitlines())[b"CapEff"], 16)
    assert effective & ~0b1111 == 0
    private = tmp_path / "private"
    private.write_text("readable")
    os.chown(private, 12345, 12345)
    private.chmod(0o600)
    assert await children.run(["cat", str(private)], timeout_seconds=5, limits=limits) == b"readable"


async def test_a_secret_is_in_no_argument_and_no_file() -> None:
    with children.secret_descriptor("s3cret") as descriptor:
        read = await children.run(
            ["cat", f"/proc/self/fd/{descriptor}"], timeout_seconds=5, pass_fds=(descriptor,)
        )
    assert read == b"s3cret"
    with pytest.raises(OSError):
        os.fstat(descriptor)


async def test_one_that_hangs_delays_nobody() -> None:
    """A child that is stopped stands for one whose mount hangs."""
    async with children.child(["sh", "-c", "kill -STOP $$"]) as stopped:
        many = (children.run(["true"], timeout_seconds=5) for _ in range(20))
        async with asyncio.timeout(10):
            await asyncio.gather(*many)
        assert stopped.returncode is None


async def test_a_lock_outlives_its_order_in_a_child(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "volume"
    async with contextlib.AsyncExitStack() as stack:
        async with children.held(lock, wait_seconds=0, otherwise="") as descriptor:
            await stack.enter_async_context(children.child(["sleep", "60"], pass_fds=(descriptor,)))
        with pytest.raises(Refused, match="still written"):
            async with children.held(lock, wait_seconds=0.1, otherwise="still written"):
                pass
    async with children.held(lock, wait_seconds=0, otherwise=""):
        assert lock.exists()
    assert not lock.exists()


def test_lines_are_put_together() -> None:
    lines = children.LineReader()
    assert lines.feed(b"on") == []
    assert lines.feed(b"e\ntwo\nthr") == [b"one", b"two"]
    assert lines.last == b"two"
    assert lines.feed(b"ee\n") == [b"three"]
