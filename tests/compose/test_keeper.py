"""What the container `setup` makes, without containers: who gets which secret, repeats, renewals."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from deploy.compose import keeper, node
from tests.support.nats_realm import ROOT
from volery.runtime.permissions import OWNERS
from volery.setup.nats_server import NatsOptions, NatsTls, render
from volery.setup.pki import Authority

LONG_AGO = datetime.now(UTC) - timedelta(days=400)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for name in (*keeper.PROGRAMS, *keeper.NATS_NODES, "realm", "database"):
        (tmp_path / name).mkdir()
    return tmp_path


def stamps(volumes: Path) -> dict[Path, int]:
    # realm.json is always written anew, with the same content.
    files = (
        path for path in volumes.rglob("*") if path.is_file() and path.name not in (".lock", "realm.json")
    )
    return {path: path.stat().st_mtime_ns for path in files}


def test_repeating_it_changes_nothing(volumes: Path) -> None:
    keeper.identities(volumes)
    before = stamps(volumes)
    keeper.identities(volumes)
    assert stamps(volumes) == before


def test_secrets_are_where_they_belong_and_readable_by_their_owner_only(volumes: Path) -> None:
    _, passwords = keeper.identities(volumes)
    for program in keeper.PROGRAMS:
        for other in OWNERS:
            others = {p.name for p in (volumes / program).iterdir()} & {f"{other}.creds", f"{other}.password"}
            assert bool(others) is (program == other)
    assert len(set(passwords.values())) == len(OWNERS)
    public = {"ca.pem", "gateway.pem", "superuser.password", *(f"{name}.pem" for name in keeper.NATS_NODES)}
    for path in stamps(volumes):
        if path.name not in public:
            assert path.stat().st_mode & 0o077 == 0, path
    assert [p.name for p in (volumes / "database").iterdir()] == ["superuser.password"]


def test_a_node_can_not_join_without_the_routes_password(volumes: Path) -> None:
    keeper.identities(volumes)
    password = (volumes / "realm" / "routes.password").read_text().strip()
    for name in keeper.NATS_NODES:
        text = (volumes / name / "nats.conf").read_text()
        assert text.count(password) == 4
        assert "sync_interval: always" in text
        assert f'advertise: "{name}:6222"' in text


@pytest.mark.parametrize(
    ("address", "wanted"), [("volery.example.org", "volery.example.org"), ("192.0.2.7", "192.0.2.7")]
)
def test_certificates_have_the_public_name(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, address: str, wanted: str
) -> None:
    monkeypatch.setenv("VOLERY_SETUP_PUBLIC_ADDRESS", address)
    keeper.identities(volumes)
    for path in (volumes / "gateway" / "gateway.pem", *(volumes / n / f"{n}.pem" for n in keeper.NATS_NODES)):
        names = x509.load_pem_x509_certificate(path.read_bytes()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert wanted in [str(name.value) for name in names.value]


def test_what_expired_is_renewed(volumes: Path) -> None:
    keeper.identities(volumes)
    pki = volumes / "realm" / "pki"
    for place, server in ((pki, "gateway"), (volumes / "nats-2", "nats-2")):
        (place / f"{server}.pem").unlink()
        Authority.open(pki).ensure(server, dns=["localhost"], directory=place, now=LONG_AGO)
    keeper.identities(volumes)
    for path in (volumes / "gateway" / "gateway.pem", volumes / "nats-2" / "nats-2.pem"):
        assert x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc > datetime.now(UTC)


PROGRAM = """
import asyncio, sys
from pathlib import Path
from deploy.compose.node import run
sys.exit(asyncio.run(run(Path(sys.argv[1]), 0.05)))
"""


async def test_a_node_reads_a_renewed_certificate_and_ends_when_it_is_told(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    issued = authority.ensure("nats", dns=["localhost"], addresses=["127.0.0.1"])
    tls = NatsTls(issued.certificate, issued.key, tmp_path / "ca.pem")
    (tmp_path / "nats.conf").write_text(render(tmp_path, NatsOptions(port=-1, tls=tls)))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    try:
        async with asyncio.timeout(20):
            while not (ports := list(tmp_path.glob("*.ports"))) or not ports[0].read_text().strip():
                await asyncio.sleep(0.02)
            port = int(ports[0].read_text().split("127.0.0.1:")[1].split('"')[0])
            first = await served(port, tmp_path / "ca.pem")
            issued.certificate.unlink()
            authority.ensure("nats", dns=["localhost"], addresses=["127.0.0.1"])
            while await served(port, tmp_path / "ca.pem") == first:
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) in (0, 1)
    finally:
        process.kill()
        process.wait()


async def served(port: int, ca: Path) -> bytes:
    """The certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=str(ca))
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(found, bytes)
    return found


def test_the_directories_that_node_and_keeper_speak_of_are_the_same() -> None:
    assert node.DIRECTORY == keeper.NATS_DIRECTORY
