"""Soft fencing: the agent of a silent host is restarted over SSH before its power is touched. Proves nothing.

The key is ha's own, one per host: its private half never leaves ha's database, where it is encrypted.
"""

from __future__ import annotations

from datetime import datetime

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Page


class SoftFence(Entity):
    """`id` is the host's. A host without one is not tried over SSH."""

    host_name: str = ""
    cluster_id: str = ""
    enabled: bool = True
    address: str = ""
    port: int = 22
    username: str = "root"
    unit: str = "volery-agent"
    """The agent's systemd unit there."""
    host_key: str = ""
    """The only key that the host's SSH server is believed by: `ssh-ed25519 AAAA…`."""
    authorized_key: str = ""
    """The line for the host's authorized_keys: ha's public key, good for nothing but the restart of the agent."""
    tested_at: datetime | None = None
    test_passed: bool = False
    test_words: str = ""


class SetSoftFence(Message):
    """Replaces what there was. The key pair is made the first time, and kept."""

    id: str
    address: str
    host_key: str
    """As `ssh-keyscan` shows it behind the name, looked at on the host itself: /etc/ssh/ssh_host_ed25519_key.pub."""
    port: int = 22
    username: str = "root"
    unit: str = "volery-agent"
    """The agent's systemd unit there: `systemctl list-units '*agent*'`. That alone can ha restart with its key."""
    enabled: bool = True
    new_key: bool = False
    """Make another key pair: the host then lets ha in by the new line only."""
    if_revision: int = 0


class TestSoftFence(Message):
    """Log in, and out again: nothing is run."""

    __test__ = False
    id: str


GET_SOFT_FENCE = Call("ha.soft_fence.get", GetById, SoftFence)
LIST_SOFT_FENCES = Call("ha.soft_fence.list", ListQuery, Page)
SET_SOFT_FENCE = Call("ha.soft_fence.set", SetSoftFence, SoftFence, mutates=True)
DELETE_SOFT_FENCE = Call("ha.soft_fence.delete", DeleteById, Done, mutates=True)
TEST_SOFT_FENCE = Call("ha.soft_fence.test", TestSoftFence, SoftFence, mutates=True, timeout_seconds=60)

SOFT_FENCE_CHANGED = Fact("fact.ha.soft_fence.{id}.changed", SoftFence)
SOFT_FENCE_DELETED = Fact("fact.ha.soft_fence.{id}.deleted", SoftFence)
