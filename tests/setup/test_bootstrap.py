"""deploy/bootstrap.sh: quiet when all is right, plain words when it can't go on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script looks at, in a place of its own, with an environment that is as it should be."""
    place = tmp_path / "checkout"
    (place / "deploy").mkdir(parents=True)
    shutil.copy(REPOSITORY / "deploy" / "bootstrap.sh", place / "deploy")
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(sys.executable)
    for name in ("requirements.lock", "requirements-dev.lock"):
        shutil.copy(REPOSITORY / name, place)
        digest = hashlib.sha256((place / name).read_bytes()).hexdigest()
        (place / ".venv" / f".volery-{name}").write_text(f"{digest} {place}\n")
    return place


def bootstrap(
    checkout: Path, *arguments: str, before: str = "true", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs it in a mount namespace of its own, so that `before` can change what it sees."""
    script = f'{before} && exec "$0" "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(checkout / "deploy" / "bootstrap.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_nothing_is_done_or_said_when_everything_is_right(checkout: Path) -> None:
    started = time.monotonic()
    for purpose in ("run", "venv"):
        done = bootstrap(checkout, purpose)
        assert done.returncode == 0, done.stderr
        assert done.stdout + done.stderr == ""
    assert time.monotonic() - started < 6


def test_a_changed_lock_file_is_noticed(checkout: Path) -> None:
    with (
        (checkout / "requirements.lock").open("a") as lock,
        (checkout / "requirements-dev.lock").open("a") as dev,
    ):
        lock.write("\nno-such-package-for-volery==1\n")
        dev.write("\nno-such-package-for-volery==1\n")
    done = bootstrap(checkout, "run", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "Python packages can't be installed" in done.stderr


def test_another_system_is_told_what_is_supported(checkout: Path, tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=plan9\nPRETTY_NAME="Plan 9"\n')
    done = bootstrap(checkout, "run", before=f"mount --bind {release} /etc/os-release")
    assert done.returncode == 1
    assert "Plan 9 isn't supported" in done.stderr
    assert "Debian 12" in done.stderr
    assert "qemu-system-x86" in done.stderr


def test_without_root_the_missing_packages_and_sudo_are_named(checkout: Path, tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == os.geteuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    empty = tmp_path / "dpkg"
    empty.mkdir()
    (empty / "status").write_text("")
    (empty / "updates").mkdir()
    (empty / "info").mkdir()
    done = bootstrap(
        checkout,
        "run",
        before='set -- "$0" "$@" && exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; true',
        DPKG_ADMINDIR=str(empty),
        VOLERY_TARGET="up",
    )
    assert done.returncode == 1
    assert "postgresql" in done.stderr
    assert "sudo make up" in done.stderr


def test_an_unknown_purpose_is_refused(checkout: Path) -> None:
    done = bootstrap(checkout, "everything")
    assert done.returncode == 1
    assert "use run, test or venv" in done.stderr


def test_make_lists_its_targets() -> None:
    listing = subprocess.run(
        ["make", "-C", str(REPOSITORY)], capture_output=True, text=True, check=True
    ).stdout
    for target in ("up", "down", "clean", "test", "check", "lab", "lab-down", "bench", "fmt", "lock"):
        assert f"make {target} " in listing
