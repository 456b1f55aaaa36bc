"""The owners' streams themselves: they can be deleted at any time and come back from PostgreSQL."""

from __future__ import annotations

from volery.contracts.base import Call, Done, Message, Owner


class RebuildStream(Message):
    """Delete the owner's stream; its relay publishes the whole retained log again."""


REBUILD_STREAM = {
    owner: Call(f"{owner}.stream.rebuild", RebuildStream, Done, timeout_seconds=30) for owner in Owner
}
