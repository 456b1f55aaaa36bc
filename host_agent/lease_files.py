"""Lease files of a storage domain, `{domain}/leases/…`; run as a child, because a mount may hang.

A program on the standard library alone, as `host_agent.files` is. A lease appears under its name whole or not at
all, and is never replaced: sanlock on another host may be writing it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import stat
import sys
from typing import Any

from host_agent.files import DIRECTORY_MODE, LEASES, answer, check_marker, refuse

LEASE_NAME = re.compile(r"lockspace|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DRAFT_NAME = re.compile(r"\.new-[0-9a-f-]{1,80}")
"""Of one host and one lease, so that a repeat takes what an interrupted one left."""
MODE = 0o660
DAEMON = "sanlock"
"""The user that sanlock runs as where its package makes one."""


def opened(root: str) -> int:
    """A descriptor of the domain's folder of leases."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(LEASES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    finally:
        os.close(top)


def checked(name: str) -> str:
    if not LEASE_NAME.fullmatch(name) and not DRAFT_NAME.fullmatch(name):
        refuse("invalid", f"{name!r} can't be the name of a lease")
    return name


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Whether a lease of this name is there."""
    try:
        directory = opened(request["root"])
    except FileNotFoundError:
        return {"exists": False}
    try:
        found = os.stat(checked(request["name"]), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return {"exists": False}
    finally:
        os.close(directory)
    if not stat.S_ISREG(found.st_mode):
        refuse("conflict", f"{request['name']} isn't a regular file: remove what is in the lease's place")
    return {"exists": True}


def draft(request: dict[str, Any]) -> dict[str, Any]:
    """An empty file of a lease's size, to be written before it gets its name."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.join(request["root"], LEASES))
        os.chmod(os.path.join(request["root"], LEASES), DIRECTORY_MODE)
    directory = opened(request["root"])
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        descriptor = os.open(checked(request["name"]), flags, MODE, dir_fd=directory)
        try:
            os.fchmod(descriptor, MODE)
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(DAEMON)
                os.fchown(descriptor, user.pw_uid, user.pw_gid)
            os.ftruncate(descriptor, request["size_bytes"])
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)
    return {}


def publish(request: dict[str, Any]) -> dict[str, Any]:
    """Gives a written draft its name, unless there is such a lease; the draft is gone either way."""
    directory = opened(request["root"])
    draft_name, name = checked(request["draft"]), checked(request["name"])
    try:
        with open(os.open(draft_name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft_name, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        os.unlink(draft_name, dir_fd=directory)
        os.fsync(directory)
    finally:
        os.close(directory)
    return {}


def discard(request: dict[str, Any]) -> dict[str, Any]:
    """Removes a lease, or a draft, absent or not."""
    try:
        directory = opened(request["root"])
    except FileNotFoundError:
        return {}
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(checked(request["name"]), dir_fd=directory)
            os.fsync(directory)
    finally:
        os.close(directory)
    return {}


def sweep(request: dict[str, Any]) -> dict[str, Any]:
    """Removes the folder of leases of a domain that is gone, unless something else is in it. Nobody may be in its
    lockspace any more."""
    root = request["root"]
    try:
        directory = opened(root)
    except FileNotFoundError:
        return {}
    try:
        check_marker(os.path.dirname(root), root, request["domain_id"], request["installation"])
        names = os.listdir(directory)
        if not all(LEASE_NAME.fullmatch(name) or DRAFT_NAME.fullmatch(name) for name in names):
            return {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(os.path.join(root, LEASES))
    return {}


VERBS = {"look": look, "draft": draft, "publish": publish, "discard": discard, "sweep": sweep}


def main() -> None:
    request = json.load(sys.stdin)
    verb = VERBS[sys.argv[1]]
    answer(lambda: verb(request), f"{sys.argv[1]} of a lease in {request['root']} failed")


if __name__ == "__main__":
    main()
