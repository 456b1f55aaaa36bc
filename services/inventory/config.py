"""Every setting of inventory, from the environment with the prefix VOLERY_INVENTORY_."""

from __future__ import annotations

import msgspec


class InventoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    secrets_dir: str = ""
    """The bus identities (`realm.json`, `keys/`): to mint agents and readers. Empty: the bus asks for none."""
    pki_dir: str = ""
    """Volery's certificate authority, which signs the certificates of agents. Empty: none is signed."""
    public_url: str = ""
    """https://host:port of the gateway as hosts reach it; goes into enrolment tokens."""
    bus_public_servers: str = ""
    """Comma-separated URLs of the bus as hosts and outside readers reach it."""
    installation: str = "volery"
    """Marks domains, bridges and storage that this installation made."""
    admin_password_file: str = ""
    """The first administrator's password, read once when there is no user yet."""
    minimum_libvirt_version: int = 7_000_000
    """libvirt's number; an older host is non-operational (Oracle Linux 8 has 7, Debian 12 has 9)."""
    io_error_first_seconds: float = 5.0
    """A VM that an I/O error paused is told to go on after this; each further time waits twice as long as the last."""
    io_error_longest_seconds: float = 60.0
    io_error_kill_seconds: float = 80.0
    """A VM whose policy is `kill` is ended when it was paused for this long (oVirt's time)."""
    evacuations_at_once: int = 2
    """VMs that leave a host at the same time when it goes into maintenance (oVirt: two outgoing migrations a host)."""
    evacuate_again_seconds: float = 300.0
    """Between attempts to move highly available VMs away from a host that has lost storage or a network; also oVirt's time
    between attempts to recover such a host."""
    power_seconds: float = 300.0
    """How long ha is asked about a host's power until it is certain whether it is off, or on again."""
    wake_seconds: float = 900.0
    """A host that was woken reports within this, or counts as one that can't be woken: servers take minutes to start."""
    restarts_placed_at_once: int = 4
    """Highly available VMs for which a host is chosen at the same time: the first of many run no later for it, and all are
    asked for sooner, as they share what carries this out."""
    restarts_at_once_on_host: int = 8
    """Highly available VMs that are brought back on one host at the same time; the others wait their turn."""
    restarts_at_once_from_storage_domain: int = 32
    """The same for VMs with disks on one storage domain."""

    def __post_init__(self) -> None:
        for name in (
            "restarts_placed_at_once",
            "restarts_at_once_on_host",
            "restarts_at_once_from_storage_domain",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but at least 1: nothing would be brought back"
                )
