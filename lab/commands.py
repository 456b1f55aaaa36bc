"""Runs the machine's programs for the lab, and says what failed in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.errors import LabError

PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def run(
    command: Sequence[str],
    *,
    timeout_seconds: float = 30.0,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> str:
    """Standard output of a program that must succeed. Raises LabError with what it said."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=None if environment is None else {**os.environ, **environment},
            cwd=directory,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(
            f"{command[0]} is not installed, and the lab needs it: install the package that has it "
            "(docs/lab.md lists them), then run the command again."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(command)}` did not end within {timeout_seconds:g} s.") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise LabError(f"`{' '.join(command)}` failed with {done.returncode}: {said}")
    return done.stdout


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs one of the lab's own modules without site packages, which is faster."""
    return [sys.executable, "-S", "-m", module, *arguments]


MODULE_ENVIRONMENT = {"PYTHONPATH": str(PACKAGE_PARENT)}
