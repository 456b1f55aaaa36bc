"""Stands between a fence agent and ipmitool, which the agent would give the password as an argument.

The agent is told no password and writes `-P ''`. Here that becomes `-f FILE`: memory of the process that runs the agent,
which ends with it. What the program itself is, comes by environment, which names no secret:

VOLERY_IPMITOOL         the real ipmitool
VOLERY_PASSWORD_FILE    where the password can be read; empty: there is none
VOLERY_DEADLINE         when it must have ended, in seconds of CLOCK_MONOTONIC
"""

import os
import signal
import sys
import time


def arguments(given: list[str], password_file: str) -> list[str]:
    """The agent's arguments with the file in place of the empty password."""
    if not password_file or "-P" not in given:
        return given
    at = given.index("-P")
    return [*given[:at], "-f", password_file, *given[at + 2 :]]


if __name__ == "__main__":
    left = float(os.environ["VOLERY_DEADLINE"]) - time.monotonic()
    if left <= 0:
        sys.exit("ipmitool was called too late")
    signal.setitimer(signal.ITIMER_REAL, left)
    program = os.environ["VOLERY_IPMITOOL"]
    os.execv(program, [program, *arguments(sys.argv[1:], os.environ["VOLERY_PASSWORD_FILE"])])  # noqa: S606 - by argument list, no shell
