"""The journal's table of domains: what was told last of each, for a later run of the agent.

libvirt has forgotten a domain that it gave up, its disks and its epoch with it; the orders that the journal knows of may
have named later epochs, which that domain never had. Every function runs inside a transaction of the journal's thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec

from volery.contracts.agent import DomainReport
from volery.contracts.base import encode
from volery.contracts.domain import DomainState

SCHEMA = """
create table if not exists domains (vm_id text primary key, report blob not null) without rowid;
"""
_report = msgspec.json.Decoder(DomainReport)


def remember(db: sqlite3.Connection, domains: Iterable[DomainReport]) -> None:
    """What has ended is forgotten."""
    for domain in domains:
        if domain.state is DomainState.GONE:
            db.execute("delete from domains where vm_id = ?", (domain.vm_id,))
        else:
            sql = "insert or replace into domains (vm_id, report) values (?, ?)"
            db.execute(sql, (domain.vm_id, encode(domain)))


def remember_only(db: sqlite3.Connection, domains: Iterable[DomainReport]) -> None:
    """There are no others."""
    db.execute("delete from domains")
    remember(db, domains)


def recall(db: sqlite3.Connection) -> dict[str, DomainReport]:
    return {
        vm_id: _report.decode(report) for vm_id, report in db.execute("select vm_id, report from domains")
    }
