"""Every setting of storage, from the environment with the prefix VOLERY_STORAGE_."""

from __future__ import annotations

import msgspec

GIB = 1024**3


class StorageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key_file: str = ""
    """A file whose content encrypts CHAP passwords and tickets in the database; made when missing. Empty: they are
    protected by the database's own access rights alone."""
    connect_seconds: float = 60.0
    """How long a host may take to connect a storage domain before it counts as not reaching it."""
    again_seconds: float = 30.0
    """Between attempts to connect a host that failed."""
    report_seconds: float = 60.0
    """How often every host is asked what is on its storage."""
    lost_after_seconds: float = 120.0
    """A host that could not read a storage domain for so long, while another host of its cluster could, has lost it and
    becomes non-operational (oVirt: 300). Shorter than what initiators and failing-over arrays ride out (open-iscsi's
    replacement_timeout is 120) would move VMs for nothing."""
    back_after_seconds: float = 60.0
    """A host that has lost a storage domain and reads it again for so long has it back."""
    reserve_bytes: int = GIB // 4
    """Space of a directory that disks may not be given: a full file system pauses every VM on it."""
    max_disk_bytes: int = 64 * 1024 * GIB
    """The largest disk that can be asked for."""
    transfer_seconds: float = 86400.0
    """How long an upload or download may take before it is cancelled."""
    discard_seconds: float = 15.0
    """How long a failed operation waits for its host to clean up; beyond it the clean-up is done when the host is back."""
    join_seconds: float = 420.0
    """How long a host may take to join a lockspace: half a minute, or until the former holder of its number is surely
    dead."""
    leave_seconds: float = 130.0
    """How long a host may take to leave a lockspace."""
    free_lease_seconds: float = 10.0
    """How long a host may take to free what a dead one held in a lockspace; until it says how that ended no other does."""
    read_lease_seconds: float = 15.0
    """How long a host may take to read another's lease."""
