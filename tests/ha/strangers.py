"""What runs on a host and was not made by Volery."""

from __future__ import annotations

from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState

DOMAIN = DomainReport(
    vm_id="0b7c2f6e-1111-4f4e-9b58-000000000001",
    epoch=0,
    order_seq=0,
    name="stranger",
    state=DomainState.RUNNING,
)
