"""Imports from URLs: a real HTTP server, redirects, limits, and the addresses that must not be read."""

from __future__ import annotations

import hashlib
import http.server
import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_agent import fetch, intake, sparse
from tests.support.agent_host import make_host, qemu_img, qemu_io, running
from tests.support.storage_domain import MIB, Domain, connected_domain
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import ImportVolume, VolumeInfo

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site:
    """A web server on loopback; `answers` decides by path, else it serves `pages`."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                if self.path in site.answers:
                    site.answers[self.path](self)
                elif self.path in site.pages:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(site.pages[self.path])))
                    self.end_headers()
                    self.wfile.write(site.pages[self.path])
                else:
                    self.send_error(404)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def redirect(self, path: str, to: str) -> None:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(302)
            request.send_header("Location", to)
            request.end_headers()

        self.answers[path] = answer


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
async def domain(tmp_path: Path) -> Domain:
    host = make_host(tmp_path / "state", import_networks="127.0.0.0/8")
    return await connected_domain(host, tmp_path / "storage")


async def bring(
    domain: Domain, url: str, sha256: str = "", max_bytes: int = 1024**3, disk_id: str = ""
) -> VolumeInfo:
    disk_id = disk_id or new_id()
    order = ImportVolume(
        disk_id=disk_id, url=url, target=domain.source(disk_id), max_bytes=max_bytes, sha256=sha256
    )
    told: list[float] = []
    info = await intake.import_volume(domain.host, order, running(told=told))
    assert told == sorted(told)
    return info


@pytest.fixture
def image(tmp_path: Path, site: Site) -> bytes:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_io(path, "write -P 7 1M 2M")
    site.pages["/image.qcow2"] = path.read_bytes()
    return path.read_bytes()


async def test_an_image_is_downloaded_checked_and_converted(domain: Domain, site: Site, image: bytes) -> None:
    disk_id = new_id()
    digest = hashlib.sha256(image).hexdigest()
    info = await bring(domain, f"{site.url}/image.qcow2", digest, disk_id=disk_id)
    assert (info.size_bytes, info.format, info.sha256) == (64 * MIB, ImageFormat.QCOW2, digest)
    assert "verification failed" not in qemu_io(domain.source(disk_id).path, "read -P 7 1M 2M")
    assert domain.leftovers() == []
    assert info.used_bytes < 4 * MIB
    again = await bring(domain, f"{site.url}/image.qcow2", disk_id=disk_id)
    assert again == info


async def test_redirects_are_followed_and_checked(domain: Domain, site: Site, image: bytes) -> None:
    site.redirect("/latest", "/image.qcow2")
    assert (await bring(domain, f"{site.url}/latest")).size_bytes == 64 * MIB
    site.redirect("/loop", "/loop")
    with pytest.raises(Refused, match="redirects more than"):
        await bring(domain, f"{site.url}/loop")
    site.redirect("/metadata", "http://169.254.169.254/latest/meta-data/")
    with pytest.raises(Refused, match="must not be imported") as refused:
        await bring(domain, f"{site.url}/metadata")
    assert refused.value.kind is Kind.FORBIDDEN
    site.redirect("/file", "file:///etc/shadow")
    with pytest.raises(Refused, match="must begin with https"):
        await bring(domain, f"{site.url}/file")
    assert domain.leftovers() == []
    assert len(os.listdir(domain.disks)) == 1


async def test_this_host_is_not_read_unless_allowed(tmp_path: Path, site: Site, image: bytes) -> None:
    strict = await connected_domain(make_host(tmp_path / "strict"), tmp_path / "other")
    for name in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"):
        with pytest.raises(Refused, match=r"must not be imported|no address|can't be resolved"):
            await bring(strict, f"http://{name}:{site.server.server_port}/image.qcow2")
    assert site.asked == []


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("ftp://127.0.0.1/x", Kind.INVALID),
        ("/etc/passwd", Kind.INVALID),
        ("http://", Kind.INVALID),
        ("http://user:secret@127.0.0.1/x", Kind.INVALID),
        ("http://127.0.0.1:99999/x", Kind.INVALID),
        ("http://127.0.0.1/a\r\nHost: x", Kind.INVALID),
        ("http://127.0.0.1:1/x", Kind.UNAVAILABLE),
        ("http://no-such-host.invalid/x", Kind.UNAVAILABLE),
        ("https://{site}/image.qcow2", Kind.FORBIDDEN),
        ("http://{site}/absent", Kind.NOT_FOUND),
    ],
)
async def test_addresses_that_do_not_lead_to_an_image(
    domain: Domain, site: Site, url: str, kind: Kind
) -> None:
    with pytest.raises(Refused) as refused:
        await bring(domain, url.replace("{site}", site.url.removeprefix("http://")))
    assert refused.value.kind is kind, refused.value.message
    assert "secret" not in refused.value.message
    assert domain.leftovers() == []
    assert os.listdir(domain.disks) == []


async def test_what_is_not_an_image_is_refused(domain: Domain, site: Site, image: bytes) -> None:
    site.pages["/page"] = b"<html><body>Please log in first</body></html>\n" * 50
    site.pages["/cut"] = image[: len(image) // 2]
    site.pages["/packed"] = b"\xfd7zXZ\x00" + bytes(4096)
    for path, reason in (("/page", "text, not"), ("/cut", "cut short"), ("/packed", "unpack it first")):
        with pytest.raises(Refused, match=reason) as refused:
            await bring(domain, site.url + path)
        assert refused.value.kind is Kind.INVALID
    with pytest.raises(Refused, match="SHA-256") as refused:
        await bring(domain, f"{site.url}/image.qcow2", "0" * 64)
    assert refused.value.kind is Kind.MISMATCH
    with pytest.raises(Refused, match="isn't a SHA-256"):
        await bring(domain, f"{site.url}/image.qcow2", "xyz")
    with pytest.raises(Refused, match="claims a disk"):
        await bring(domain, f"{site.url}/image.qcow2", max_bytes=32 * MIB)
    assert domain.leftovers() == []
    assert os.listdir(domain.disks) == []


async def test_too_much_is_not_downloaded(domain: Domain, site: Site) -> None:
    site.pages["/large"] = bytes(3 * MIB)

    def endless(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(64):
            try:
                request.wfile.write(b"x" * MIB)
            except OSError:
                return

    def short(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(2 * MIB))
        request.end_headers()
        request.wfile.write(bytes(MIB))

    site.answers |= {"/endless": endless, "/short": short}
    for path in ("/large", "/endless"):
        with pytest.raises(Refused, match="allowed") as refused:
            await bring(domain, site.url + path, max_bytes=2 * MIB)
        assert refused.value.kind is Kind.TOO_LARGE
    with pytest.raises(Refused) as refused:
        await bring(domain, f"{site.url}/short")
    assert refused.value.kind is Kind.UNAVAILABLE
    assert domain.leftovers() == []


@pytest.mark.parametrize(
    ("address", "is_forbidden"),
    [
        ("127.0.0.53", True),
        ("169.254.169.254", True),
        ("100.100.100.200", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("255.255.255.255", True),
        ("::1", True),
        ("fe80::1", True),
        ("fd00:ec2::254", True),
        ("::ffff:169.254.169.254", True),
        ("2002:7f00:1::", True),
        ("10.1.2.3", False),
        ("192.168.1.10", False),
        ("93.184.216.34", False),
        ("2a00:1450::1", False),
    ],
)
def test_forbidden_addresses(address: str, is_forbidden: bool) -> None:
    assert fetch.forbidden(ipaddress.ip_address(address), []) is is_forbidden
    everything: list[fetch.Network] = [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]
    assert not fetch.forbidden(ipaddress.ip_address(address), everything)


@pytest.mark.parametrize(
    ("pieces", "at_most"),
    [((1024 * 1024,), 400_000), ((200_000, 131_072), 700_000), ((70_000, 1, 65_535, 3), 2_000_000)],
)
def test_a_sparse_file_has_the_bytes_and_the_holes(
    tmp_path: Path, pieces: tuple[int, ...], at_most: int
) -> None:
    data = os.urandom(100_000) + bytes(1_000_000) + os.urandom(5) + bytes(300_000) + b"end" + bytes(70_000)
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    target = sparse.SparseFile(descriptor, 0)
    start = 0
    while start < len(data):
        size = pieces[start % len(pieces)]
        target.write(memoryview(data)[start : start + size])
        start += size
    assert target.position == os.fstat(descriptor).st_size == len(data)
    assert os.fstat(descriptor).st_blocks * 512 < at_most
    os.close(descriptor)
    assert (tmp_path / "f").read_bytes() == data
