"""The whole control plane in one process: `python -m services`. The same code as one process per service."""

from __future__ import annotations

from api_gateway.service import gateway
from services.dwh.service import service as dwh
from services.ha.service import service as ha
from services.inventory.service import service as inventory
from services.network.service import service as network
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from volery.runtime.programs import run

run(inventory, scheduler, storage, network, ha, dwh, gateway)
