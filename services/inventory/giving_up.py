"""Nothing stays of an attempt to start a VM on a host: the host forgets it, and the scheduler gets its claim back."""

from __future__ import annotations

from services.inventory.desk import Inventory
from volery.contracts.agent import Outcome
from volery.contracts.domain_orders import FORGET_DOMAIN, ForgetDomain
from volery.contracts.errors import Refused
from volery.contracts.scheduling import RELEASE_CLAIM, ClaimKey
from volery.runtime.deaths import host_died
from volery.runtime.run import Run


async def give_up_host(inv: Inventory, run: Run, vm_id: str, attempt: int, epoch: int, host_id: str) -> None:
    """Nothing of this attempt stays on the host, and its claim is given back. Of what a boot that died was told to run
    nothing is left, and no other boot takes an order that was sent to it."""
    order_id = run.order_id(f"run-{attempt}")
    result = await inv.core.orders.stored(order_id)
    died = result is not None and result.outcome is Outcome.HOST_DIED
    if not died and await inv.core.orders.exists(order_id):
        await _forget(inv, run, vm_id, attempt, epoch, host_id)
    await release_claim(inv, run, vm_id, epoch)


async def _forget(inv: Inventory, run: Run, vm_id: str, attempt: int, epoch: int, host_id: str) -> None:
    was, run.undoing = run.undoing, True
    try:
        await run.order(
            f"forget-{attempt}",
            "Making sure that nothing is left there",
            FORGET_DOMAIN,
            ForgetDomain(vm_id=vm_id),
            host_id=host_id,
            epoch=epoch,
        )
    except Refused as refused:
        if not host_died(refused):
            raise
    finally:
        run.undoing = was


async def release_claim(inv: Inventory, run: Run, vm_id: str, epoch: int) -> None:
    question = ClaimKey(vm_id=vm_id, epoch=epoch)
    await inv.core.bus.ask(RELEASE_CLAIM, question, run.caller_for(f"release-{epoch}"))
