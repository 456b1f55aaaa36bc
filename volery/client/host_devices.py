"""Devices of hosts."""

from __future__ import annotations

from volery.client import api
from volery.client.request import Request
from volery.contracts.host_devices import HostDevices


def of_host(host_id: str) -> Request[HostDevices]:
    return Request("GET", f"{api.HOSTS.path}/{host_id}/devices", HostDevices)
