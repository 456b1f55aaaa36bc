"""The table of every endpoint, gathered from one module per noun."""

from __future__ import annotations

from api_gateway.route import Route, Special
from api_gateway.routes import (
    accounts,
    fencing,
    hosts,
    machinery,
    networks,
    places,
    scheduling,
    storage,
    vms,
)
from api_gateway.sockets import SocketRoute

TABLE: tuple[Route | Special, ...] = (
    *accounts.ROUTES,
    *places.ROUTES,
    *hosts.ROUTES,
    *fencing.ROUTES,
    *vms.ROUTES,
    *storage.ROUTES,
    *networks.ROUTES,
    *scheduling.ROUTES,
    *machinery.ROUTES,
)
SOCKETS: tuple[SocketRoute, ...] = (*machinery.SOCKETS, *vms.SOCKETS)
