"""What README and docs tell a person to type is typed here, on an installation that `make up` made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.timeout(900)


def blocks(page: str, heading: str) -> list[str]:
    """The shell blocks under a heading."""
    text = (ROOT / page).read_text()
    part = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return BLOCK.findall(part)


def make(home: Path, target: str, **environment: str) -> str:
    # A person's shell has no virtual environment of ours.
    environ = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        ["make", target],
        cwd=ROOT,
        env=environ | {"VOLERY_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="volery-readme-", dir="/tmp"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        make(place, "clean", YES="1")
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def first_output(home: Path) -> str:
    return make(home, "up")


def qemus(home: Path) -> set[int]:
    """QEMU processes of this installation, by the path of their disks."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command.startswith(b"/usr/bin/qemu-system") and str(home).encode() in command:
                found.add(int(entry.name))
    return found


def shell(home: Path, script: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=os.environ | {"VOLERY_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_make_up_ends_with_a_vm_that_has_a_name_and_an_address(first_output: str) -> None:
    assert "Virtual machine first (first at " in first_output
    assert "Log in as admin with the password" in first_output


def test_make_up_again_changes_nothing(home: Path, first_output: str) -> None:
    running = qemus(home)
    again = make(home, "up")
    assert qemus(home) == running
    assert len(running) == 1
    assert "password" not in again
    modes = {
        path.name: path.stat().st_mode & 0o077 for path in (home / "secrets").rglob("*") if path.is_file()
    }
    assert not any(modes.values()), modes


def test_the_tour_with_the_command_line(home: Path, first_output: str) -> None:
    (tour,) = blocks("README.md", "Five minutes with the command line")
    told = shell(home, tour)
    assert "vm.delete of web1: done" in told


def test_the_tour_with_curl(home: Path, first_output: str) -> None:
    (tour,) = blocks("README.md", "Five minutes with curl")
    told = shell(home, tour)
    assert '"name":"first"' in told
    assert '"ready":true' in told


def test_an_outside_system_follows_the_stream(home: Path, first_output: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/events.md").read_text()
    example = tmp_path / "follow.py"
    example.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    made = yaml.safe_load(shell(home, f"bin/volery event-reader create billing --directory {tmp_path}"))
    stream, durable = "FACTS_INVENTORY", made["consumers"]["FACTS_INVENTORY"]
    arguments = [",".join(made["servers"]), made["credentials"], made["ca"], stream, durable, "5"]
    done = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert done.stdout.startswith("dev.volery.inventory.")


def test_make_down_leaves_guests_running(home: Path, first_output: str) -> None:
    running = qemus(home)
    make(home, "down")
    assert qemus(home) == running != set()
    make(home, "up")
    assert qemus(home) == running
