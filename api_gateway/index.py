"""/api/v1: links to what there is, made from the table."""

from __future__ import annotations

import importlib

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange
from api_gateway.route import PREFIX, Special
from volery.contracts.base import encode


async def index(desk: Desk, http: Exchange) -> None:
    # Imported when asked: the table names this handler.
    table = importlib.import_module("api_gateway.routes").TABLE
    collections = sorted(
        row.path.strip("/")
        for row in table
        if (
            row.method == "GET"
            and row.path
            and "{" not in row.path
            and getattr(row, "prefix", PREFIX) == PREFIX
            and not isinstance(row, Special)
        )
        or row.path in ("/operations", "/events")
    )
    links = {name: f"{PREFIX}/{name}" for name in dict.fromkeys(collections)}
    await http.answer(
        200, encode({"version": "v1", "docs": "/docs", "openapi": "/openapi.json", "links": links})
    )
