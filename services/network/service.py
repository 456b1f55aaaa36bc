"""The table of what network answers, hears and runs."""

from __future__ import annotations

from services.network import hosts, losses, mac_pools, networks, nics, projection
from services.network.config import NetworkConfig
from services.network.fabric import open_fabric
from services.network.reconcile import reconcile, reconcile_all
from volery.contracts.agent import NETWORK_ORDER_FINISHED, NETWORK_ORDER_PROGRESSED, NETWORKS_REPORTED
from volery.contracts.base import Owner
from volery.runtime.service import Service


def make_service() -> Service:
    return Service(
        Owner.NETWORK,
        open_fabric,
        NetworkConfig,
        [networks.part, mac_pools.part, nics.part, hosts.part, losses.part, projection.part],
        report=NETWORKS_REPORTED,
        order_finished=NETWORK_ORDER_FINISHED,
        order_progressed=NETWORK_ORDER_PROGRESSED,
        reconcile=reconcile,
        reconcile_all=reconcile_all,
        on_gap=projection.list_again,
        on_lead=mac_pools.make_default,
    )


service = make_service()
