"""A machine becomes a host for a one-time token, over TLS that nobody can stand in between, and again after a crash."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from cryptography import x509
from nats.js.api import StreamConfig

from host_agent import enrolment
from host_agent.agent import Agent, connect_options
from host_agent.config import AgentConfig
from host_agent.enrolment import EnrolmentError, Unreachable
from tests.support import nats_realm, toy_agent
from tests.support.agent_process import ROOT, AgentProcess
from volery.contracts.agent import SIGNATURE_HEADER, HostCapabilities, HostReported
from volery.contracts.base import encode
from volery.contracts.enrolment import (
    CA_PATH,
    ENROL_PATH,
    RENEW_PATH,
    RENEW_SUBJECT,
    CertificateRenewed,
    Enrol,
    Enrolled,
    EnrolmentToken,
    RenewCertificate,
    read_token,
)
from volery.contracts.ids import new_id
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import verify
from volery.setup.pki import Authority, fingerprint

SECRET = "one-time-secret"


@dataclass
class ControlPlane:
    """The other side: a TLS server with a CA of its own that answers as inventory does."""

    directory: Path
    authority: Authority
    realm: Realm
    host_id: str = field(default_factory=new_id)
    bus_url: str = "nats://127.0.0.1:4222"
    public_key: str = ""
    asked: list[Enrol] = field(default_factory=list)
    status: int = 200
    swap_ca: str = ""
    url: str = ""

    def start(self, certificate: Path | None = None, key: Path | None = None) -> None:
        issued = self.authority.ensure("gateway", addresses=["127.0.0.1"], directory=self.directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate or issued.certificate, key or issued.key)
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(
                    200 if self.path == CA_PATH else 404, (plane.swap_ca or plane.authority.pem).encode()
                )

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer: Callable[[bytes, Any], tuple[int, bytes]] = {
                    ENROL_PATH: plane.enrol,
                    RENEW_PATH: plane.renew,
                }[self.path]
                self.say(*answer(body, self.headers))

            def say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def token(self) -> EnrolmentToken:
        return EnrolmentToken(url=self.url, ca_sha256=fingerprint(self.authority.pem), secret=SECRET)

    def enrol(self, body: bytes, _headers: Any) -> tuple[int, bytes]:
        ask = msgspec.json.decode(body, type=Enrol)
        self.asked.append(ask)
        if self.status != 200:
            return self.status, json.dumps({"detail": "this enrolment token has expired"}).encode()
        assert ask.token == SECRET
        if self.public_key not in ("", ask.public_key):
            return 409, b'{"detail":"enrolled with another key"}'
        self.public_key = ask.public_key
        certificate = self.authority.sign_request(ask.csr_pem, self.host_id, addresses=ask.addresses)
        return 200, encode(
            Enrolled(
                host_id=self.host_id,
                installation="test",
                user_jwt=mint_agent(self.realm, self.host_id, ask.public_key),
                bus_servers=(self.bus_url,),
                owner_keys=self.realm.order_keys(),
                ca_pem=self.swap_ca or self.authority.pem,
                certificate_pem=certificate,
            )
        )

    def renew(self, body: bytes, headers: Any) -> tuple[int, bytes]:
        ask = msgspec.json.decode(body, type=RenewCertificate)
        if ask.public_key != self.public_key or not verify(
            ask.public_key, RENEW_SUBJECT, body, headers[SIGNATURE_HEADER]
        ):
            return 403, b'{"detail":"not signed by the host"}'
        certificate = self.authority.sign_request(
            ask.csr_pem, self.host_id, addresses=ask.addresses, lifetime=timedelta(days=365)
        )
        return 200, encode(
            CertificateRenewed(
                user_jwt=mint_agent(self.realm, self.host_id, ask.public_key),
                bus_servers=("nats://127.0.0.1:1", self.bus_url),
                owner_keys=self.realm.order_keys(),
                ca_pem=self.authority.pem,
                certificate_pem=certificate,
            )
        )


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    (tmp_path / "pki").mkdir()
    made = ControlPlane(tmp_path / "pki", Authority.open(tmp_path / "pki"), Realm.create(tmp_path / "bus"))
    made.start()
    yield made
    made.stop()


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


async def test_a_machine_becomes_a_host(plane: ControlPlane, tmp_path: Path) -> None:
    capabilities = HostCapabilities(hostname="here", hardware_uuid="u")
    identity = await enrolment.enrol(tmp_path / "state", plane.token, capabilities)
    assert identity.host_id == plane.host_id
    assert identity.enrolled.owner_keys == plane.realm.order_keys()
    assert plane.asked[0].capabilities == capabilities
    assert plane.asked[0].public_key == plane.public_key
    assert set(modes(tmp_path / "state" / "identity").values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "state" / "identity").stat().st_mode) == 0o700
    context = ssl.create_default_context(cafile=str(identity.ca_path))
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    names = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes()).extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "127.0.0.1" in [str(a) for a in found.get_values_for_type(x509.IPAddress)]
    assert enrolment.load(tmp_path / "state") == identity


async def test_what_it_got_opens_the_bus_for_its_own_subjects_only(
    plane: ControlPlane, tmp_path: Path
) -> None:
    server = nats_realm.Server(tmp_path / "nats", plane.realm)
    server.write_config()
    server.start()
    try:
        plane.bus_url = server.url
        identity = await enrolment.enrol(tmp_path / "state", plane.token)
        errors: asyncio.Queue[str] = asyncio.Queue()

        async def on_error(error: Exception) -> None:
            errors.put_nowait(str(error).lower())

        client = await nats.connect(**connect_options(identity), error_cb=on_error)
        await client.publish(f"fact.host.{identity.host_id}.inventory.toy", b"")
        await client.publish(f"beat.host.{identity.host_id}", b"")
        await client.subscribe(f"host.{identity.host_id}.order")
        another = f"beat.host.{new_id()}"
        await client.publish(another, b"")
        async with asyncio.timeout(5):
            first = await errors.get()
        assert "permissions violation" in first
        assert another in first
        await client.close()
    finally:
        server.stop()


async def test_a_crash_between_answer_and_store_is_harmless(plane: ControlPlane, tmp_path: Path) -> None:
    state = tmp_path / "state"
    await enrolment.enrol(state, plane.token)
    (state / "identity" / "identity.json").unlink()
    assert enrolment.load(state) is None
    again = await enrolment.enrol(state, plane.token)
    assert again.host_id == plane.host_id
    assert plane.asked[0].public_key == plane.asked[1].public_key


async def test_a_second_machine_is_refused(plane: ControlPlane, tmp_path: Path) -> None:
    await enrolment.enrol(tmp_path / "first", plane.token)
    with pytest.raises(EnrolmentError, match="another key"):
        await enrolment.enrol(tmp_path / "second", plane.token)
    assert enrolment.load(tmp_path / "second") is None


async def test_somebody_in_between_gets_nothing(plane: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    evil = ControlPlane(tmp_path / "evil", Authority.open(tmp_path / "evil"), plane.realm)
    evil.start()
    try:
        token = msgspec.structs.replace(plane.token, url=evil.url)
        with pytest.raises(EnrolmentError, match="another certificate authority"):
            await enrolment.enrol(tmp_path / "state", token)
        evil.swap_ca = plane.authority.pem
        with pytest.raises(EnrolmentError, match="did not prove who it is"):
            await enrolment.enrol(tmp_path / "state", token)
        assert evil.asked == []
    finally:
        evil.stop()


async def test_an_answer_with_another_authority_is_not_stored(plane: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority.open(tmp_path / "other").pem
    plane.enrol, real = (  # type: ignore[method-assign]
        lambda body, headers: (
            200,
            encode(
                msgspec.structs.replace(
                    msgspec.json.decode(real(body, headers)[1], type=Enrolled), ca_pem=other
                )
            ),
        ),
        plane.enrol,
    )
    with pytest.raises(EnrolmentError, match="nothing was stored"):
        await enrolment.enrol(tmp_path / "state", plane.token)
    assert enrolment.load(tmp_path / "state") is None


async def test_refusals_and_absence_are_told_apart(plane: ControlPlane, tmp_path: Path) -> None:
    plane.status = 403
    with pytest.raises(EnrolmentError, match="has expired") as refused:
        await enrolment.enrol(tmp_path / "state", plane.token)
    assert not isinstance(refused.value, Unreachable)
    plane.status = 503
    with pytest.raises(Unreachable):
        await enrolment.enrol(tmp_path / "state", plane.token)
    gone = msgspec.structs.replace(plane.token, url="https://127.0.0.1:1")
    with pytest.raises(Unreachable):
        await enrolment.enrol(tmp_path / "state", gone)
    with pytest.raises(EnrolmentError, match="https"):
        await enrolment.enrol(
            tmp_path / "state", msgspec.structs.replace(plane.token, url="http://127.0.0.1:1")
        )
    assert SECRET not in str(refused.value)


async def test_certificates_renew_also_after_they_expired(plane: ControlPlane, tmp_path: Path) -> None:
    identity = await enrolment.enrol(tmp_path / "state", plane.token)
    left = enrolment.certificate_seconds_left(identity, datetime.now(UTC).timestamp())
    assert left is not None
    assert 0 < left < 91 * 86400
    renewed = await enrolment.renew(tmp_path / "state", identity)
    longer = enrolment.certificate_seconds_left(renewed, datetime.now(UTC).timestamp())
    assert longer is not None
    assert longer > 300 * 86400
    assert renewed.enrolled.bus_servers[0] == "nats://127.0.0.1:1"
    assert renewed.host_id == identity.host_id
    assert renewed.keys == identity.keys
    ssl.create_default_context().load_cert_chain(renewed.certificate_path, renewed.key_path)


async def test_a_host_of_an_older_release_learns_whom_else_to_obey(
    plane: ControlPlane, tmp_path: Path
) -> None:
    """At its agent's next start, without being enrolled again."""
    identity = await enrolment.enrol(tmp_path / "state", plane.token)
    assert not enrolment.is_due(identity, datetime.now(UTC).timestamp())
    older = {owner: key for owner, key in identity.enrolled.owner_keys.items() if owner != "ha"}
    enrolled = msgspec.structs.replace(identity.enrolled, owner_keys=older)
    identity = enrolment.store(tmp_path / "state", msgspec.structs.replace(identity, enrolled=enrolled))
    assert enrolment.is_due(identity, datetime.now(UTC).timestamp())
    settings = AgentConfig(state_dir=str(tmp_path / "state"), libvirt_uri="test:///default")
    stop = asyncio.Event()
    task = asyncio.create_task(Agent(settings, identity, toy_agent.PARTS).run(stop))
    try:
        async with asyncio.timeout(30):
            while not (found := enrolment.load(tmp_path / "state")) or "ha" not in found.enrolled.owner_keys:
                await asyncio.sleep(0.02)  # nobody announces it
    finally:
        stop.set()
        await task
    assert found.enrolled.owner_keys == plane.realm.order_keys()
    assert not enrolment.is_due(found, datetime.now(UTC).timestamp())


@pytest.mark.parametrize("text", ["", "volery", "volery-enrol.", "volery-enrol.!!!", "volery-enrol.e30"])
def test_a_damaged_token_is_said_to_be_one(text: str) -> None:
    with pytest.raises(ValueError, match="token"):
        read_token(text)


def test_a_token_reads_as_it_was_written() -> None:
    token = EnrolmentToken(url="https://a:1", ca_sha256="sha256:ab", secret="s")
    assert read_token(f" {token.text()}\n") == token


def run_agent(state: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "VOLERY_AGENT_STATE_DIR": str(state),
        "VOLERY_AGENT_LIBVIRT_URI": "test:///default",
        "PATH": os.environ["PATH"],
        **settings,
    }
    return subprocess.run(
        [sys.executable, "-m", "host_agent", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command_enrols_once(plane: ControlPlane, tmp_path: Path) -> None:
    for _ in range(2):
        done = run_agent(tmp_path / "state", "enrol", VOLERY_AGENT_ENROLMENT_TOKEN=plane.token.text())
        assert done.returncode == 0, done.stderr
        assert plane.host_id in done.stdout
    assert len(plane.asked) == 1
    assert plane.asked[0].capabilities.cpus > 0
    assert SECRET not in done.stderr


def test_without_a_token_it_says_what_to_do(tmp_path: Path) -> None:
    done = run_agent(tmp_path / "state", "run")
    assert done.returncode == 78
    assert "VOLERY_AGENT_ENROLMENT_TOKEN" in done.stderr


def test_a_setting_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run_agent(tmp_path / "state", "run", VOLERY_AGENT_BEAT_SECOND="1")
    assert done.returncode == 78
    assert "VOLERY_AGENT_BEAT_SECOND is not a setting" in done.stderr
    assert run_agent(tmp_path / "state", "dance").returncode == 64


async def test_a_damaged_identity_is_not_taken_for_none(plane: ControlPlane, tmp_path: Path) -> None:
    await enrolment.enrol(tmp_path / "state", plane.token)
    (tmp_path / "state" / "identity" / "identity.json").write_text("{")
    with pytest.raises(EnrolmentError, match="damaged"):
        enrolment.load(tmp_path / "state")


async def test_an_enrolled_host_reports_and_serves_its_data_with_its_own_certificate(
    plane: ControlPlane, tmp_path: Path
) -> None:
    """From the token to a TLS connection that the installation's authority vouches for, by the real program."""
    server = nats_realm.Server(tmp_path / "nats", plane.realm)
    server.write_config()
    server.start()
    plane.bus_url = server.url
    agent = AgentProcess(tmp_path / "state", {"VOLERY_AGENT_ENROLMENT_TOKEN": plane.token.text()})
    try:
        user = await nats_realm.open_user(server, plane.realm.creds_path("inventory"), "inventory")
        await user.nc.jetstream().add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
        reports = await user.nc.jetstream().subscribe(
            f"fact.host.{plane.host_id}.inventory.reported", ordered_consumer=True
        )
        (tmp_path / "state").mkdir()
        agent.start()
        message = await reports.next_msg(timeout=30)
        report = msgspec.json.decode(message.data, type=HostReported)
        address, _, port = report.capabilities.data_address.rpartition(":")
        trusting = ssl.create_default_context(cadata=plane.authority.pem)

        def ask() -> int:
            client = http.client.HTTPSConnection(address, int(port), timeout=5, context=trusting)
            client.request("GET", "/images/no-such-ticket")
            return client.getresponse().status

        assert await asyncio.to_thread(ask) == 404
        assert SECRET not in agent.log
        assert agent.stop() == 0
        await user.nc.close()
    finally:
        agent.kill()
        server.stop()
