"""What `sanlock client command` becomes once it holds a lease: says so, then becomes the tool.

`python -S -m host_agent.leased_tool FD PROGRAM ARGUMENTS…`, on the standard library alone. Without it nobody could
tell a tool that failed from a lease that was refused: sanlock's own exit status means either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

BEGAN = b"1"
NOT_FOUND = 127


def main(arguments: Sequence[str]) -> int:
    """Returns only when the program can't be started."""
    descriptor, *command = arguments
    os.write(int(descriptor), BEGAN)
    os.close(int(descriptor))
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"{command[0]} can't be started: {error.strerror}\n")
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
