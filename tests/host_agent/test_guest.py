"""What guests tell: names and addresses reach the domain's report, and a stuck agent delays nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from host_agent.events import EventName
from host_agent.guest import FIRST_SECONDS, REFRESH_SECONDS, STUCK_SECONDS, _Turns, watch_guests
from tests.support.vms import VmHost, nic, tiny_spec
from volery.contracts.errors import Refused

pytestmark = pytest.mark.timeout(180)


def test_who_has_no_address_is_asked_again_soon_and_who_is_stuck_seldom() -> None:
    turns = _Turns()
    turns.add("a", 100.0)
    assert turns.next() == ("a", 100.0)
    pauses = []
    now = 100.0
    for _ in range(8):
        turns.again("a", now, REFRESH_SECONDS)
        pauses.append(turns.due["a"] - now)
        now = turns.due["a"]
    assert pauses[0] == FIRST_SECONDS
    assert pauses[-1] == REFRESH_SECONDS
    for _ in range(12):
        turns.again("a", now, STUCK_SECONDS)
        now = turns.due["a"]
    turns.again("a", now, STUCK_SECONDS)
    assert turns.due["a"] - now == STUCK_SECONDS
    turns.drop("a")
    turns.again("a", now, REFRESH_SECONDS)
    assert turns.next() is None


@asynccontextmanager
async def watching(host: VmHost) -> AsyncIterator[None]:
    task = asyncio.create_task(watch_guests(host.host))
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_guests_name_and_address_are_reported_and_forgotten_with_it(qemu: VmHost) -> None:
    spec = tiny_spec(nics=(nic("br-one"),), kernel_cmdline="console=ttyS0 quiet ip4=192.168.9.7/24")
    async with watching(qemu):
        await qemu.run(spec)
        await qemu.until(lambda e: e.name is EventName.GUEST_CHANGED and e.vm_id == spec.vm_id, 60)
        report = await qemu.hypervisor.domain(spec.vm_id)
        assert report.hostname == spec.hostname
        assert report.ip_addresses == ("192.168.9.7",)
        assert report.guest_os == "Volery test guest 1"
        since = len(qemu.heard)
        await qemu.power_off(spec.vm_id)
        await qemu.until(lambda e: e.name is EventName.GUEST_CHANGED, since=since)
        assert (await qemu.hypervisor.domain(spec.vm_id)).ip_addresses == ()


async def test_a_stuck_agent_costs_only_its_own_guest(qemu: VmHost) -> None:
    spec, other = tiny_spec(), tiny_spec()
    await qemu.run(spec)
    await qemu.run(other)
    for vm in (spec, other):
        await qemu.agent_up(vm.vm_id)
    console = await qemu.hypervisor.open_console(spec.vm_id)
    await console.write(b"\nkillall -STOP qemu-ga && echo stop''ped\n")
    heard = b""
    async with asyncio.timeout(20):
        while b"stopped" not in heard:
            heard += await console.read()
    await console.close()
    asking = asyncio.create_task(qemu.hypervisor.guest_info(spec.vm_id))
    async with asyncio.timeout(4):
        await qemu.hypervisor.pause(spec.vm_id)
        await qemu.hypervisor.resume(spec.vm_id)
        await qemu.hypervisor.list_domains()
    with pytest.raises(Refused, match="guest agent"):
        await asking
    assert (await qemu.hypervisor.guest_info(other.vm_id)).hostname == other.hostname
    assert qemu.hypervisor.unresponsive == frozenset()
    assert qemu.hypervisor.stuck.count == 0
