"""Writes an upload into its staging file; run as a child, because the storage may hang.

A program on the standard library alone: `python -S -m host_agent.receive VERB`, a line of JSON and then, for
`write`, the bytes themselves on standard input. What was written stays whatever ends the child, and `look` says
how much of it counts: everything while the machine runs on, what was synced after it went down.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from host_agent import files, sparse

BUFFER_BYTES = 1024 * 1024


def sidecar(name: str) -> str:
    """The file beside a staging file that says how much of it is durable, and its sum when it is known."""
    return f"{name}.json"


def load(directory: int, name: str) -> dict[str, Any]:
    try:
        descriptor = files.opened(directory, sidecar(name))
    except FileNotFoundError:
        return {}
    with open(descriptor, "rb") as file:
        stored: dict[str, Any] = json.loads(file.read())
    return stored


def begin(request: dict[str, Any]) -> dict[str, Any]:
    """Make the staging file, or find what a former upload left; one of another size is begun anew."""
    with files.folder(request["root"], "staging") as directory:
        name, stored = request["name"], load(directory, request["name"])
        if stored.get("size_bytes") != request["size_bytes"] or not files.lexists(directory, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            os.close(files.opened(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            keep(directory, request, durable_bytes=0)
        return look(request)


def look(request: dict[str, Any]) -> dict[str, Any]:
    """How many bytes of the upload are here for good."""
    with files.folder(request["root"], "staging") as directory:
        stored = load(directory, request["name"])
        if not stored or not files.lexists(directory, request["name"]):
            return {"exists": False}
        descriptor = files.opened(directory, request["name"], os.O_RDWR)
        try:
            received = os.fstat(descriptor).st_size
            if stored["boot_id"] != request["boot_id"]:
                received = min(received, stored["durable_bytes"])
                os.ftruncate(descriptor, received)
        finally:
            os.close(descriptor)
    return {
        "exists": True,
        "size_bytes": stored["size_bytes"],
        "received_bytes": received,
        "sha256": stored["sha256"] if received == stored["size_bytes"] else "",
    }


def keep(directory: int, request: dict[str, Any], durable_bytes: int, sha256: str = "") -> None:
    known = {
        "size_bytes": request["size_bytes"],
        "boot_id": request["boot_id"],
        "durable_bytes": durable_bytes,
        "sha256": sha256,
    }
    files.write_durably(directory, sidecar(request["name"]), json.dumps(known).encode())


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Standard input to its end, from `offset` on; never beyond the announced size."""
    with files.folder(request["root"], "staging") as directory:
        descriptor = files.opened(directory, request["name"], os.O_RDWR)
        received = look(request)["received_bytes"]
        offset = request["offset"]
        if offset > received:
            files.refuse("conflict", f"{received} bytes were received: go on from there, not from {offset}")
        os.ftruncate(descriptor, offset)
        target = sparse.SparseFile(descriptor, offset)
        hashed = hashlib.sha256() if offset == 0 else None
        try:
            for piece in pieces(request["size_bytes"] - offset):
                if hashed is not None:
                    hashed.update(piece)
                target.write(piece)
                if target.position - target.synced >= files.SYNC_BYTES:
                    target.sync()
                    keep(directory, request, target.synced)
        finally:  # also on a full storage: what is there stays, and the upload goes on from it later
            with contextlib.suppress(OSError):
                target.sync()
                whole = hashed is not None and target.position == request["size_bytes"]
                keep(directory, request, target.synced, hashed.hexdigest() if hashed and whole else "")
            os.close(descriptor)
        return {"received_bytes": target.position}


def pieces(limit: int) -> Iterator[memoryview]:
    """Standard input in large pieces."""
    view = memoryview(bytearray(BUFFER_BYTES))
    while limit > 0 and (
        count := sparse.fill(lambda free: os.readv(0, [free]), view[: min(len(view), limit)])
    ):
        yield view[:count]
        limit -= count


def discard(request: dict[str, Any]) -> dict[str, Any]:
    """Remove the staging file and what was kept about it."""
    with files.folder(request["root"], "staging") as directory:
        for name in (request["name"], sidecar(request["name"])):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.checked(name), dir_fd=directory)
        files.remove_scratch(directory, sidecar(request["name"]))
    return {}


VERBS = {"begin": begin, "look": look, "write": write, "discard": discard}


def first_line() -> bytes:
    """Up to the first line break, and nothing of what follows it."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"\n", b""):
        line += byte
    return bytes(line)


def main() -> None:
    os.umask(0o007)
    request = json.loads(first_line())
    files.answer(lambda: VERBS[sys.argv[1]](request), f"the upload's staging file in {request['root']}")


if __name__ == "__main__":
    main()
