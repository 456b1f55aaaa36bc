"""Ends a throw-away server and removes its directory when whoever started it is gone, however it went.

    python undertaker.py PID DIRECTORY

Its standard input is a pipe that only its starter holds open: the end of that pipe is the end of the
starter, by SIGKILL, too. Imports nothing of ours, so that it is there within milliseconds.
"""

import os
import shutil
import signal
import sys


def main(pid: int, directory: str) -> None:
    try:
        server = os.pidfd_open(pid)  # from now on this very process, whatever becomes of the pid
    except ProcessLookupError:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the starter
    while os.read(0, 1024):
        pass
    try:
        signal.pidfd_send_signal(server, signal.SIGKILL)
    except ProcessLookupError:
        return  # it was stopped in good order
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
