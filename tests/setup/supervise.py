"""Runs a supervisor with the test's own program, as `python -m volery.setup.supervisor` does with ours."""

from __future__ import annotations

from volery.setup.home import Home
from volery.setup.programs import Program
from volery.setup.supervisor import Supervisor

STEADY = Program("steady", "a steady program", "tests.setup.steady")

if __name__ == "__main__":
    Supervisor(Home.from_environment(), programs=(STEADY,)).run()
