"""Hosts that have promised more than they have: one that came back with less memory, or whose cluster's over-commit was lowered."""

from __future__ import annotations

from collections.abc import Iterator

from services.scheduler.policies.request import size
from volery.contracts.scheduling import HostCapacity


def shortage(host: HostCapacity) -> str:
    """What is promised beyond what there is, and what to do about it; "" when nothing is."""
    short = list(_short(host))
    if not short:
        return ""
    return (
        f"{host.name} has promised more than it has: {' and '.join(short)}. Its VMs run on, and it gets no further ones; move some "
        f"away (volery vm migrate), let it have what it lacks, or raise the over-commit of its cluster"
    )


def _short(host: HostCapacity) -> Iterator[str]:
    if host.memory_used_bytes > host.memory_bytes:
        over = host.memory_used_bytes - host.memory_bytes
        yield f"{size(host.memory_used_bytes)} of memory, of {size(host.memory_bytes)} ({size(over)} too much)"
    if host.vcpus_used > host.vcpus_limit:
        over = host.vcpus_used - host.vcpus_limit
        yield f"{host.vcpus_used} vCPUs, of {host.vcpus_limit} ({over} too many)"
    for name, used, there in (
        ("2 MiB", host.pages_2m_used, host.pages_2m),
        ("1 GiB", host.pages_1g_used, host.pages_1g),
    ):
        if used > there:
            yield f"{used} huge pages of {name}, of {there} ({used - there} too many)"
