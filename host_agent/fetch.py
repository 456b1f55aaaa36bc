"""Downloads an image over http(s) into a staging file; run as a child, and never from where it must not look.

A program on the standard library alone: `python -S -m host_agent.fetch get`, a JSON request on standard input,
lines of progress and the answer on standard output. Every address, also after a redirect, is checked before it
is connected to, and the connection goes to exactly the address that was checked.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import os
import socket
import ssl
import sys
import urllib.parse
from typing import Any

from host_agent import files, sparse
from volery.runtime.clock import monotonic

MAX_REDIRECTS = 5
CONNECT_SECONDS = 20.0
STALL_SECONDS = 60.0
PROGRESS_SECONDS = 1.0
BUFFER_BYTES = 1024 * 1024
PORTS = {"http": 80, "https": 443}
METADATA = (ipaddress.ip_network("fd00:ec2::/32"), ipaddress.ip_network("100.100.100.200/32"))
"""Clouds' metadata services outside the link-local ranges."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def forbidden(address: Address, allowed: list[Network]) -> bool:
    """Whether an image must not come from there: this host itself, link-local, or nothing that can be a server."""
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if mapped is not None:
        return forbidden(mapped, allowed)
    if any(address in network for network in allowed):
        return False
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and address.version == 4)
        or any(address in network for network in METADATA)
    )


def resolve(host: str, port: int, allowed: list[Network]) -> list[tuple[int, Any]]:
    """The socket addresses of a host, if all of them may be connected to."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        files.refuse("unavailable", f"{host} can't be resolved: {error.strerror}")
    for _, _, _, _, address in found:
        if forbidden(ipaddress.ip_address(str(address[0]).partition("%")[0]), allowed):
            files.refuse(
                "forbidden",
                f"{host} is {address[0]}, from where images must not be imported: it is this host itself, "
                "link-local, or a cloud's metadata service (VOLERY_AGENT_IMPORT_NETWORKS allows exceptions)",
            )
    return [(family, address) for family, _, _, _, address in found]


def plain_connection(host: str, port: int, allowed: list[Network]) -> socket.socket:
    problem = "it has no address"
    for family, address in resolve(host, port, allowed):
        plain = socket.socket(family, socket.SOCK_STREAM)
        plain.settimeout(CONNECT_SECONDS)
        try:
            plain.connect(address)
        except OSError as error:
            problem = error.strerror or str(error)
            plain.close()
        else:
            return plain
    return files.refuse("unavailable", f"{host}:{port} can't be reached: {problem}")


def connect(url: urllib.parse.SplitResult, request: dict[str, Any]) -> http.client.HTTPConnection:
    allowed: list[Network] = [ipaddress.ip_network(text) for text in request["allowed"]]
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    connection = http.client.HTTPConnection(host, port)
    connection.sock = plain_connection(host, port, allowed)
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=request["ca_file"] or None)
        try:
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        except ssl.SSLError as error:
            files.refuse("forbidden", f"{host} did not prove who it is: {error.reason or error}")
        except OSError as error:
            files.refuse("unavailable", f"{host}:{port} ended the connection: {error.strerror or error}")
    connection.sock.settimeout(STALL_SECONDS)
    return connection


def checked(text: str) -> urllib.parse.SplitResult:
    try:
        url = urllib.parse.urlsplit(text)
        _ = url.port
    except ValueError as error:
        files.refuse("invalid", f"{text[:200]!r} isn't a URL: {error}")
    if url.scheme not in PORTS or not url.hostname or not text.isprintable() or " " in text:
        files.refuse(
            "invalid", f"{text[:200]!r} isn't an address of an image: it must begin with https:// or http://"
        )
    if url.username is not None or url.password is not None:
        files.refuse(
            "invalid", "a URL with a user name in it isn't taken: passwords would show in logs and events"
        )
    return url


def open_url(request: dict[str, Any]) -> http.client.HTTPResponse:
    """The answer that has the image, after at most five redirects. Never from https to http."""
    url = checked(request["url"])
    for _ in range(MAX_REDIRECTS + 1):
        connection = connect(url, request)
        path = url.path or "/"
        connection.request(
            "GET",
            f"{path}?{url.query}" if url.query else path,
            headers={"User-Agent": "volery", "Accept": "*/*", "Accept-Encoding": "identity"},
        )
        response = connection.getresponse()
        if response.status not in (301, 302, 303, 307, 308):
            return response
        target = checked(urllib.parse.urljoin(url.geturl(), response.headers.get("Location", "")))
        if url.scheme == "https" and target.scheme == "http":
            files.refuse("forbidden", f"{url.hostname} redirects from https to http: use the final address")
        url = target
        connection.close()
    return files.refuse("invalid", f"{request['url'][:200]} redirects more than {MAX_REDIRECTS} times")


def get(request: dict[str, Any]) -> dict[str, Any]:
    """Download into the staging file."""
    response = open_url(request)
    if response.status != 200:
        kind = "not_found" if response.status in (404, 410) else "unavailable"
        files.refuse(
            kind, f"the server answered {response.status} {response.reason} for {request['url'][:200]}"
        )
    announced = int(response.headers.get("Content-Length") or 0)
    limit = request["max_bytes"]
    if announced > limit:
        files.refuse("too_large", f"the image has {announced} bytes; here at most {limit} are allowed")
    with files.folder(request["root"], "staging") as directory:
        descriptor = files.opened(directory, request["name"], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            return copy(response, sparse.SparseFile(descriptor, 0), limit, announced)
        finally:
            os.close(descriptor)


def copy(
    response: http.client.HTTPResponse, target: sparse.SparseFile, limit: int, announced: int
) -> dict[str, Any]:
    hashed = hashlib.sha256()
    view = memoryview(bytearray(BUFFER_BYTES))
    told = monotonic()
    while count := sparse.fill(response.readinto, view):
        if target.position + count > limit:
            files.refuse("too_large", f"the image has more than the {limit} bytes allowed here")
        hashed.update(view[:count])
        target.write(view[:count])
        if announced and monotonic() - told > PROGRESS_SECONDS:
            told = monotonic()
            files.say({"progress": target.position / announced * 100})
    if target.position < announced:
        files.refuse(
            "unavailable", f"the server ended after {target.position} of {announced} bytes: try again"
        )
    target.sync()
    return {"size_bytes": target.position, "sha256": hashed.hexdigest()}


def fetched(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return get(request)
    except TimeoutError:
        files.refuse("unavailable", f"the server sent nothing for {STALL_SECONDS:g} s")
    except http.client.HTTPException as error:
        files.refuse("unavailable", f"the server's answer can't be understood: {type(error).__name__}")


def main() -> None:
    os.umask(0o007)
    request = json.load(sys.stdin)
    files.answer(lambda: fetched(request), f"downloading {request['url'][:200]}")


if __name__ == "__main__":
    main()
