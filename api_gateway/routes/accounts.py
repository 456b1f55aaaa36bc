"""Sessions, tokens, users, and outside systems that read events."""

from __future__ import annotations

from api_gateway import sessions
from api_gateway.openapi_parts import answer_of, body_of
from api_gateway.route import Route, Special
from volery.contracts import account as a
from volery.contracts.account import Scope

SESSIONS, USERS, READERS = "Sessions and tokens", "Users", "Event readers"

ROUTES = (
    Special(
        "POST", "/sessions", sessions.log_in, SESSIONS, "Log in", scope=None, mutates=True,
        note="Answers a token: send `Authorization: Bearer {secret}` from then on. Attempts are counted per "
             "address and per name (429).",
        request_body=body_of(a.Login, {"name": "admin", "password": "…"}),
        responses={201: answer_of(a.IssuedToken, "The token; `secret` is shown once")},
        refuses=(400, 401, 413, 415, 429),
    ),
    Special(
        "GET", "/sessions/current", sessions.current, SESSIONS, "Who this token is",
        responses={200: answer_of(a.Principal, "The principal that every service sees")},
    ),
    Special(
        "DELETE", "/sessions/current", sessions.log_out, SESSIONS, "Log out: delete this token", mutates=True,
        responses={204: {"description": "The token is worth nothing from now on"}},
    ),
    Route("GET", "/tokens", a.LIST_TOKENS, SESSIONS, "List tokens", items=a.Token, scope=Scope.ADMIN),
    Route("DELETE", "/tokens/{id}", a.DELETE_TOKEN, SESSIONS, "Delete a token", scope=Scope.ADMIN),
    Route("GET", "/users", a.LIST_USERS, USERS, "List users", items=a.User, scope=Scope.ADMIN),
    Route("POST", "/users", a.CREATE_USER, USERS, "Create a user", at="/users", scope=Scope.ADMIN),
    Route("GET", "/users/{id}", a.GET_USER, USERS, "Get a user", scope=Scope.ADMIN),
    Route("DELETE", "/users/{id}", a.DELETE_USER, USERS, "Delete a user", scope=Scope.ADMIN),
    Route("POST", "/users/{id}/password", a.CHANGE_PASSWORD, USERS, "Change a user's password",
          scope=Scope.ADMIN, note="`current_password` is needed when it is one's own."),
    Route("GET", "/event-readers", a.LIST_EVENT_READERS, READERS, "List outside systems that read events",
          items=a.EventReader, scope=Scope.ADMIN),
    Route("POST", "/event-readers", a.CREATE_EVENT_READER, READERS, "Give an outside system its credentials",
          scope=Scope.ADMIN, at="/event-readers",
          note="Read-only NATS credentials for the facts of some services, shown once."),
    Route("DELETE", "/event-readers/{id}", a.DELETE_EVENT_READER, READERS, "Take an outside system's credentials away",
          scope=Scope.ADMIN),
)  # fmt: skip
