"""/docs and /openapi.json: everything they load comes from here, nothing from the internet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from api_gateway.openapi import document
from api_gateway.route import Route, Special

ASSETS = Path(fastapi_offline.__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Swagger UI starts itself with an inline script; nothing on the page comes from a user."""
PATHS = ("/", "/docs", "/openapi.json")


def serves(path: str) -> bool:
    return path in PATHS or path.startswith("/docs/assets/")


def mount(app: FastAPI, table: Sequence[Route | Special]) -> None:
    @cache
    def described() -> bytes:
        return document(table)

    async def openapi(_: Request) -> Response:
        return Response(described(), media_type="application/json")

    async def swagger(_: Request) -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Volery: the REST API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
            swagger_ui_parameters={"displayRequestDuration": True, "docExpansion": "none", "filter": True},
        )
        page.headers["content-security-policy"] = POLICY
        page.headers["x-content-type-options"] = "nosniff"
        page.headers["referrer-policy"] = "no-referrer"
        return page

    async def home(_: Request) -> RedirectResponse:
        return RedirectResponse("/docs", status_code=307)

    app.add_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    app.add_route("/docs", swagger, methods=["GET"], include_in_schema=False)
    app.add_route("/", home, methods=["GET"], include_in_schema=False)
    app.mount("/docs/assets", StaticFiles(directory=ASSETS), name="assets")
