"""Enrolment, health, documentation, TLS: what is there before anybody has logged in."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import ssl
import sys
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from api_gateway.config import GatewayConfig
from api_gateway.route import Route
from api_gateway.routes import TABLE
from tests.api_gateway.scripted import Deployed, Script, decoded, deployed
from tests.support.certificates import make_certificate
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.base import Done, Owner, encode
from volery.contracts.enrolment import (
    ENROL_HOST,
    RENEW_HOST_CERTIFICATE,
    RENEW_SUBJECT,
    CertificateRenewed,
    Enrol,
    Enrolled,
    RenewCertificate,
)
from volery.contracts.health import EXCUSE_HOST, GET_HEALTH, Health
from volery.contracts.streams import REBUILD_STREAM
from volery.runtime.signing import Key, Signer
from volery.setup.embedded import Embedded

ENROLLED = Enrolled(
    host_id="h1",
    installation="i",
    user_jwt="j",
    bus_servers=("nats://x",),
    owner_keys={},
    ca_pem="c",
    certificate_pem="p",
)
RENEWED = CertificateRenewed(user_jwt="j", bus_servers=(), owner_keys={}, ca_pem="c", certificate_pem="p")


def anonymous(gateway: Deployed) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url)


async def test_a_machine_enrols_with_its_token_alone(gateway: Deployed) -> None:
    gateway.script.on(ENROL_HOST, ENROLLED)
    ask = Enrol(token="secret", public_key="U1", csr_pem="csr", hostname="h")
    async with anonymous(gateway) as http:
        # A newer agent may say more than this gateway knows.
        body = json.loads(encode(ask)) | {"news": 1}
        answer = await http.post("/api/v1/enrolment", json=body)
        assert answer.status_code == 200
        assert decoded(answer)["host_id"] == "h1"
        assert gateway.script.questions(ENROL_HOST)[0] == ask
        assert (await http.post("/api/v1/enrolment", json={"token": 1})).status_code == 400


async def test_a_renewal_is_signed_by_the_key_it_names(gateway: Deployed) -> None:
    gateway.script.on(RENEW_HOST_CERTIFICATE, RENEWED)
    key, other = Key.new("user"), Key.new("user")
    body = encode(RenewCertificate(host_id="h1", public_key=key.public, csr_pem="csr"))
    right = Signer(key.seed).sign(RENEW_SUBJECT, body)
    async with anonymous(gateway) as http:

        async def renew(signature: str, content: bytes = body) -> int:
            headers = {SIGNATURE_HEADER: signature, "content-type": "application/json"}
            return (await http.post("/api/v1/enrolment/renew", content=content, headers=headers)).status_code

        assert await renew(right) == 200
        assert await renew("") == 401
        assert await renew(Signer(other.seed).sign(RENEW_SUBJECT, body)) == 401
        assert await renew(Signer(key.seed).sign("host.h1.order", body)) == 401
        assert await renew(right, body.replace(b"h1", b"h2")) == 401
    assert len(gateway.script.questions(RENEW_HOST_CERTIFICATE)) == 1


async def test_health(gateway: Deployed) -> None:
    quarantined = Health(owner=Owner.STORAGE, leader=True, quarantine="restored", waits_for_hosts=("h1",))
    gateway.script.on(GET_HEALTH[Owner.STORAGE], quarantined)
    gateway.script.on(EXCUSE_HOST[Owner.STORAGE], Done())
    gateway.script.on(REBUILD_STREAM[Owner.HA], Done())
    async with anonymous(gateway) as http:
        assert (await http.get("/livez")).text == "ok\n"
        ready = await http.get("/readyz")
        assert ready.status_code == 200
        assert decoded(ready)["services"] == {str(owner): True for owner in Owner}
        assert decoded(ready)["quarantine"] == {"storage": "restored"}
        assert (await http.get("/ca.pem")).status_code == 404
        assert (await http.get("/api/v1/health")).status_code == 401
    health = {item["service"]: item for item in decoded(await gateway.get("/health"))["items"]}
    assert health["storage"]["health"]["waits_for_hosts"] == ["h1"]
    assert (await gateway.http.post("/streams/ha/rebuild", json={})).status_code == 204
    excused = await gateway.http.post("/hosts/h1/excuse", json={"confirm": "h1"})
    assert excused.status_code == 204
    assert [q.confirm for q in gateway.script.questions(EXCUSE_HOST[Owner.STORAGE])] == ["h1"]
    assert not gateway.script.questions(EXCUSE_HOST[Owner.INVENTORY])


async def test_metrics_are_openmetrics_and_name_no_object(gateway: Deployed) -> None:
    for path in ("/vms/secret-id", "/nothing", "/vms/x/start"):
        await gateway.get(path)
    text = (await gateway.http.get(f"{gateway.url}/metrics")).text
    assert text.endswith("# EOF\n")
    line = re.compile(r'[a-z_]+(\{([a-z_]+="[^"]*",?)+\})? [0-9.]+')
    for found in text.splitlines():
        assert found.startswith("# ") or line.fullmatch(found), found
    assert 'volery_http_requests_total{method="GET",path="/vms/{id}",status="404"} 1' in text
    assert "secret-id" not in text


async def test_the_index_links_to_what_there_is(gateway: Deployed) -> None:
    links = decoded(await gateway.http.get(f"{gateway.url}/api/v1"))["links"]
    assert links["vms"] == "/api/v1/vms"
    for path in set(links.values()) - {"/api/v1/events"}:
        assert "nothing at this path" not in (await gateway.http.get(gateway.url + path)).text


async def test_the_document_describes_the_table(gateway: Deployed) -> None:
    answer = await gateway.http.get(f"{gateway.url}/openapi.json")
    document = decoded(answer)
    assert document["openapi"].startswith("3.1")
    operations = [op for path in document["paths"].values() for op in path.values()]
    assert len(operations) == len(TABLE)
    assert len({op["operationId"] for op in operations}) == len(TABLE)
    for row in TABLE:
        path = f"{row.prefix if not isinstance(row, Route) else '/api/v1'}{row.path}"
        described = document["paths"][path][row.method.lower()]
        assert described["summary"]
        assert {int(s) for s in described["responses"]} >= (
            {row.success} if isinstance(row, Route) else set()
        )
    text = answer.text
    for name in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
        assert name in document["components"]["schemas"]
    described = document["components"]["schemas"]["Vm"]["properties"]["epoch"]
    assert described["description"] == "Counts its placements."
    assert "attach_to" not in document["components"]["schemas"]["CreateDisk"]["properties"]


async def test_the_documentation_loads_nothing_from_elsewhere(gateway: Deployed) -> None:
    async with anonymous(gateway) as http:
        page = await http.get("/docs")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(links) >= 3
        for link in links:
            assert urljoin(gateway.url, link).startswith(gateway.url)
            assert (await http.get(link)).status_code == 200
        assert "cdn" not in page.text
        assert "/openapi.json" in page.text
        assert (await http.get("/docs/assets/../../app.py")).status_code == 404
        assert (await http.get("/docs/assets/%2e%2e/core.py")).status_code == 404
        assert (await http.get("/")).status_code == 307


async def test_a_renewed_certificate_is_taken_up_without_a_restart(nats: Embedded, tmp_path: Path) -> None:
    first, second = (make_certificate(tmp_path / name) for name in ("first", "second"))
    used = tmp_path / "used"
    shutil.copytree(first.parent, used)
    config = GatewayConfig(
        listen="127.0.0.1:0",
        certificate=str(used / "data.crt"),
        key=str(used / "data.key"),
        ca=str(used / "data.crt"),
        certificate_check_seconds=0.1,
        port_file=str(tmp_path / "port"),
    )

    async def live(port: str, trusted: Path) -> bool:
        context = ssl.create_default_context(cafile=str(trusted))
        async with httpx.AsyncClient(verify=context) as http:
            try:
                return (await http.get(f"https://127.0.0.1:{port}/livez")).status_code == 200
            except httpx.ConnectError:
                return False

    async with deployed(nats.url, Script(), config):
        port = (tmp_path / "port").read_text().strip()
        assert await live(port, first)
        assert not await live(port, second)
        context = ssl.create_default_context(cafile=str(first))
        async with httpx.AsyncClient(verify=context) as http:
            assert (await http.get(f"https://127.0.0.1:{port}/ca.pem")).content == first.read_bytes()
        shutil.copy(second.with_name("data.key"), used)
        await asyncio.sleep(0.3)  # between the two files: the old pair is still used
        assert await live(port, first)
        shutil.copy(second, used)
        async with asyncio.timeout(10):
            while not await live(port, second):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("LISTEN", "8443", "host:port"),
        ("COLOUR", "red", "is not a setting"),
        ("BODY_LIMIT_BYTES", "x", "int"),
    ],
)
async def test_a_setting_that_does_not_fit_is_named(
    nats: Embedded, setting: str, value: str, says: str
) -> None:
    environment = {**os.environ, f"VOLERY_GATEWAY_{setting}": value, "VOLERY_BUS_SERVERS": nats.url}
    environment["VOLERY_BUS_REQUIRE_SYNC_ALWAYS"] = "false"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "api_gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    said = (await process.stderr.read()).decode()
    assert await process.wait() != 0
    assert says in said
    assert "Traceback" not in said


async def test_a_taken_port_is_named(gateway: Deployed, nats: Embedded) -> None:
    with pytest.raises(OSError, match="another program has it"):
        async with deployed(nats.url, Script(), GatewayConfig(listen=gateway.url.removeprefix("http://"))):
            pass
