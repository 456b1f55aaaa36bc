"""Files that hold the memory of suspended VMs; run as a child, because a mount may hang.

A program on the standard library alone, as `host_agent.files` is. What it answers is on the disk: also a host that loses
its power at once has it so.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from host_agent.files import answer

SPENT = ".spent"
"""After the name of memory with which a guest may have run on: nothing is restored from it any more."""


@contextlib.contextmanager
def place_of(path: str) -> Iterator[tuple[int, str]]:
    """A descriptor of the file's directory, and the file's name in it."""
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory, os.path.basename(path)
    finally:
        os.close(directory)


def spend(request: dict[str, Any]) -> dict[str, Any]:
    """The memory is to be found under its name no more; as often as it is asked."""
    with place_of(request["path"]) as (directory, name):
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, name + SPENT, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    return {}


def unspend(request: dict[str, Any]) -> dict[str, Any]:
    """The guest is known not to have run: its memory is to be found again, if it was spent."""
    with place_of(request["path"]) as (directory, name):
        with contextlib.suppress(FileNotFoundError):
            os.rename(name + SPENT, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    return {}


def remove(request: dict[str, Any]) -> dict[str, Any]:
    """Gone, spent or not; or was never there."""
    with place_of(request["path"]) as (directory, name):
        for each in (name, name + SPENT):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each, dir_fd=directory)
        os.fsync(directory)
    return {}


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Whether something is in it."""
    try:
        return {"exists": os.stat(request["path"]).st_size > 0}
    except FileNotFoundError:
        return {"exists": False}


VERBS = {"spend": spend, "unspend": unspend, "remove": remove, "look": look}


def main() -> None:
    request = json.load(sys.stdin)
    verb = VERBS[sys.argv[1]]
    answer(lambda: verb(request), f"{sys.argv[1]} of the saved memory {request['path']} failed")


if __name__ == "__main__":
    main()
