"""The table of hosts whose agent may be restarted over SSH."""

from __future__ import annotations

from volery.contracts.base import Message
from volery.contracts.soft_fence import SOFT_FENCE_CHANGED, SOFT_FENCE_DELETED, SoftFence
from volery.runtime.tables import Table


class SoftFencePrivate(Message):
    key: str = ""
    """ha's private key for this host (OpenSSH's PEM), sealed."""


SOFT_FENCES: Table[SoftFence, SoftFencePrivate] = Table(
    "soft_fence",
    SoftFence,
    SoftFencePrivate,
    columns={"host_name": "host_name", "cluster_id": "cluster_id", "enabled": "enabled"},
    changed=SOFT_FENCE_CHANGED,
    deleted=SOFT_FENCE_DELETED,
    noun="soft fencing of host",
)
