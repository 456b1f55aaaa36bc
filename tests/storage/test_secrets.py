"""CHAP passwords and tickets: sealed at rest, in no fact, no answer and no operation."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import known, site, storage_process
from tests.storage.test_disks import IQN, iscsi
from tests.storage.test_transfers import opened
from volery.contracts.base import Owner
from volery.contracts.errors import Refused
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings
from volery.runtime.vault import MARK, open_vault

SECRET = "chap-secret-word"
SETTING = "VOLERY_STORAGE_KEY_FILE"


def test_a_vault_opens_what_it_sealed_and_nothing_else(tmp_path: Path) -> None:
    key = tmp_path / "key"
    vault = open_vault(str(key), SETTING)
    sealed = vault.seal(SECRET)
    assert sealed.startswith(MARK)
    assert SECRET not in sealed
    assert vault.open(sealed) == SECRET
    assert open_vault(str(key), SETTING).open(sealed) == SECRET
    assert key.stat().st_mode & 0o077 == 0
    for other in (open_vault(str(tmp_path / "other"), SETTING), open_vault("", SETTING)):
        with pytest.raises(Refused, match=SETTING):
            other.open(sealed)
    assert open_vault("", SETTING).seal(SECRET) == SECRET
    assert vault.seal("") == ""
    assert vault.open("from before there was a key") == "from before there was a key"


async def test_secrets_are_nowhere_in_the_database(configured: Settings, tmp_path: Path) -> None:
    """Everything that storage keeps, once its orders have ended: objects, log, operations, requests, orders."""
    async with (
        storage_process(configured, VOLERY_STORAGE_KEY_FILE=str(tmp_path / "key")),
        site(configured, hosts=1, outside=True) as at,
    ):
        at.shelf.passwords[IQN] = SECRET
        domain = await iscsi(at, {1: GIB}, chap_user="u", chap_password=SECRET)
        disk = await at.new_disk(domain)
        transfer = await opened(at, disk)
        ticket = at.hosts[0].opened[transfer.id].ticket
        assert any(q.location.chap_password == SECRET for q in at.hosts[0].agent.begun("storage.connect"))
        await known(configured, [at.rows[0].id])
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            tables = await connection.fetch(
                "select table_name from information_schema.tables where table_schema = 'storage'"
            )
            whole = ""
            for table in tables:
                rows = await connection.fetch(f'select t::text as row from "{table["table_name"]}" t')
                whole += "\n".join(row["row"] for row in rows)
        assert domain.id in whole
        for secret in (SECRET, ticket):
            assert secret not in whole
            assert secret.encode().hex() not in whole
        assert msgspec.json.encode(transfer).find(ticket.encode()) < 0
