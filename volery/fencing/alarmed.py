"""Runs a program that must end in time even if it, or the whole host, is frozen meanwhile: `alarmed.py SECONDS PROGRAM…`.

A process that is stopped in the middle of switching a machine off, and goes on an hour later, would switch off one
that is healthy by then. The kernel's timer goes on while it is stopped, and its signal ends the program before its next
instruction. The timer survives exec, and no process that starts the program needs to live for it.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - by argument list, no shell
