"""Starts one program detached, in a control group and a network namespace of the lab.

`python -S -m lab.launch GROUP NETNS DIRECTORY LOG PIDFILE COMMAND…`: returns once the program runs and
its pid is in PIDFILE. The lab's host processes are started by `lab.init` instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lab import cgroups, kernel


def main(arguments: list[str]) -> int:
    group, netns, directory, log, pid_file, *command = arguments
    cgroups.join(group)
    kernel.join_namespace(f"/run/netns/{netns}")
    os.chdir(directory)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pid = os.fork()
    if pid:
        Path(f"{pid_file}.new").write_text(str(pid))
        os.rename(f"{pid_file}.new", pid_file)
        return 0
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    return os.execvp(command[0], command)  # noqa: S606 - by argument list, no shell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
