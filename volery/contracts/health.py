"""Whether an owner is well, and whether it waits, after a restore of an older database, for hosts to report."""

from __future__ import annotations

from volery.contracts.base import Call, Done, Message, Owner


class AskHealth(Message):
    """How are you?"""


class Health(Message):
    owner: Owner
    leader: bool
    """Whether the replica that answered does the background work."""
    quarantine: str = ""
    """Why nothing is started, moved or deleted for now; "" when all is well."""
    waits_for_hosts: tuple[str, ...] = ()
    log_history: str = ""
    log_position: int = 0
    """The newest fact in its log. A stream that is further is of a time that the database has forgotten."""


class ExcuseHost(Message):
    """A person says that this host is dead and nothing of it runs any more, so that quarantine needn't wait for it."""

    host_id: str
    confirm: str
    """The host's id again, typed."""


GET_HEALTH = {owner: Call(f"{owner}.health.get", AskHealth, Health, timeout_seconds=3) for owner in Owner}
EXCUSE_HOST = {owner: Call(f"{owner}.quarantine.excuse", ExcuseHost, Done) for owner in Owner}
