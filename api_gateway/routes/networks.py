"""Logical networks and MAC pools."""

from __future__ import annotations

from api_gateway.route import Route
from volery.contracts import network as n

NETWORKS, POOLS = "Networks", "MAC pools"

ROUTES = (
    Route("GET", "/networks", n.LIST_NETWORKS, NETWORKS, "List logical networks", items=n.Network),
    Route("POST", "/networks", n.CREATE_NETWORK, NETWORKS, "Create a logical network", at="/networks"),
    Route("GET", "/networks/{id}", n.GET_NETWORK, NETWORKS, "Get a logical network"),
    Route("PATCH", "/networks/{id}", n.UPDATE_NETWORK, NETWORKS, "Change a logical network"),
    Route("DELETE", "/networks/{id}", n.DELETE_NETWORK, NETWORKS, "Delete a logical network"),
    Route("GET", "/mac-pools", n.LIST_MAC_POOLS, POOLS, "List MAC pools", items=n.MacPool),
    Route("POST", "/mac-pools", n.CREATE_MAC_POOL, POOLS, "Create a MAC pool", at="/mac-pools"),
    Route("GET", "/mac-pools/{id}", n.GET_MAC_POOL, POOLS, "Get a MAC pool"),
    Route("PATCH", "/mac-pools/{id}", n.UPDATE_MAC_POOL, POOLS, "Change a MAC pool"),
    Route("DELETE", "/mac-pools/{id}", n.DELETE_MAC_POOL, POOLS, "Delete a MAC pool"),
)  # fmt: skip
