"""Keys, their files and signatures: reused, told apart, never shown."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from tests.support.nats_realm import ROOT
from volery.runtime.connection import CredsFile
from volery.runtime.identity import Realm
from volery.runtime.permissions import ACCOUNT_OF, OWNERS, SERVICES, SIGNERS, permissions_of, table
from volery.runtime.signing import IdentityError, Key, Signer, Verifier, is_public_key, parse_creds, verify


def test_a_second_start_reuses_every_key_and_changes_no_file(tmp_path: Path) -> None:
    first = Realm.create(tmp_path / "bus")
    before = {p: p.read_bytes() for p in (tmp_path / "bus").rglob("*") if p.is_file()}
    second = Realm.create(tmp_path / "bus")
    after = {p: p.read_bytes() for p in (tmp_path / "bus").rglob("*") if p.is_file()}
    assert second == first == Realm.load(tmp_path / "bus")
    assert after == before
    assert set(first.users) == {*SERVICES, "sys", "claims"}
    assert set(first.resolver_preload()) == set(first.accounts.values())


def test_secrets_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    Realm.create(tmp_path / "bus")
    for path in [tmp_path / "bus", *(tmp_path / "bus").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_starters_at_the_same_moment_make_one_realm(tmp_path: Path) -> None:
    makers = [asyncio.to_thread(Realm.create, tmp_path / "bus") for _ in range(6)]
    realms = await asyncio.gather(*makers)
    assert all(realm == realms[0] for realm in realms)


def test_a_lost_operator_key_is_told_instead_of_replaced(tmp_path: Path) -> None:
    Realm.create(tmp_path / "bus")
    (tmp_path / "bus" / "keys" / "operator.seed").unlink()
    with pytest.raises(IdentityError, match=r"operator\.seed is missing.*backup"):
        Realm.create(tmp_path / "bus")
    assert not (tmp_path / "bus" / "keys" / "operator.seed").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    realm.creds_path("ha").write_text("")
    with pytest.raises(IdentityError, match="NATS credentials"):
        Realm.create(tmp_path / "bus")
    with pytest.raises(IdentityError, match=r"ha\.creds.*NATS credentials"):
        CredsFile(realm.creds_path("ha"))
    with pytest.raises(IdentityError, match=r"can't read .*nobody\.creds"):
        CredsFile(realm.creds_path("nobody"))
    with pytest.raises(IdentityError, match=r"can't read .*realm\.json"):
        Realm.load(tmp_path / "elsewhere")


def test_a_deleted_service_credential_is_made_anew_and_the_others_stay(tmp_path: Path) -> None:
    before = Realm.create(tmp_path / "bus")
    before.creds_path("ha").unlink()
    after = Realm.create(tmp_path / "bus")
    assert after.users["ha"] != before.users["ha"]
    assert {k: v for k, v in after.users.items() if k != "ha"} == {
        k: v for k, v in before.users.items() if k != "ha"
    }


def test_a_running_program_survives_credentials_that_are_being_replaced(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    creds = CredsFile(realm.creds_path("ha"))
    good = creds.sign("nonce"), creds.jwt()
    realm.creds_path("ha").write_text("half a fi")
    assert (creds.sign("nonce"), creds.jwt()) == good
    realm.creds_path("ha").write_text(realm.creds_path("dwh").read_text())
    assert creds.sign("nonce") != good[0]
    assert creds.public_key == realm.users["dwh"]


def test_seeds_never_show_in_a_trace() -> None:
    key = Key.new("user")
    assert key.seed not in repr(key)
    assert key.public in repr(key)


@pytest.mark.parametrize("text", ["", "U", "SUAAA", "ü", "U" * 56, "not a key", "O" * 56])
def test_what_is_no_public_key_is_seen(text: str) -> None:
    assert not is_public_key(text, "user")


def test_a_public_key_is_of_one_kind() -> None:
    assert is_public_key(Key.new("user").public, "user")
    assert not is_public_key(Key.new("account").public, "user")
    altered = Key.new("user").public
    assert not is_public_key(altered[:-5] + ("B" if altered[-5] == "A" else "A") + altered[-4:], "user")


def test_no_role_has_an_empty_list_which_would_mean_everything() -> None:
    for role in ACCOUNT_OF:
        claims = permissions_of(role).claims()
        assert claims["pub"].get("allow") or claims["pub"]["deny"] == [">"]
        assert claims["sub"].get("allow") or claims["sub"]["deny"] == [">"]
        for side in ("pub", "sub"):
            assert not {">", "*", "host.>", "fact.>", "$JS.API.>"} & set(claims[side].get("allow", []))


def test_the_documentation_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "architecture" / "identities.md").read_text()


def test_an_order_is_known_by_its_signature(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    subject, payload = "host.a.order", b'{"kind":"domain.destroy"}'
    signers = {o: Signer(parse_creds(realm.creds_path(o).read_text())[1].seed) for o in OWNERS}
    verifier = Verifier(realm.order_keys())
    for owner, signer in signers.items():
        header = signer.sign(subject, payload)
        assert verify(signer.public_key, subject, payload, header)
        expected = owner if owner in SIGNERS else None
        assert verifier.owner_of(subject, payload, header) == expected


def test_a_signature_holds_for_one_subject_and_one_payload_only() -> None:
    signer, other = Signer(Key.new("user").seed), Signer(Key.new("user").seed)
    header = signer.sign("host.a.order", b"payload")
    _, _, signature = header.partition(".")
    forgeries = [
        (signer.public_key, "host.b.order", b"payload", header),
        (signer.public_key, "host.a.order", b"payloae", header),
        (signer.public_key, "host.a.order\npay", b"load", header),
        (signer.public_key, "host.a.orderpay", b"load", header),
        (other.public_key, "host.a.order", b"payload", header),
        (other.public_key, "host.a.order", b"payload", f"{other.public_key}.{signature}"),
        (signer.public_key, "host.a.order", b"payload", header[:-2]),
        (signer.public_key, "host.a.order", b"payload", ""),
        (signer.public_key, "host.a.order", b"payload", f"{signer.public_key}.ü!"),
        ("nonsense", "host.a.order", b"payload", f"nonsense.{signature}"),
    ]
    for forgery in forgeries:
        assert not verify(*forgery), forgery
