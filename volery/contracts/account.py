"""Local accounts, tokens, and outside systems that read the event stream. Roles come later."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from volery.contracts.base import Call, Done, Entity, Fact, Message, Owner
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Page


class Scope(StrEnum):
    READ = "read"
    WRITE = "write"
    """Everything but accounts."""
    ADMIN = "admin"


class User(Entity):
    name: str
    full_name: str = ""
    enabled: bool = True


class CreateUser(Message):
    name: str
    password: str
    full_name: str = ""


class ChangePassword(Message):
    id: str
    password: str
    current_password: str = ""
    """Needed when it is one's own."""


class Login(Message):
    name: str
    password: str
    scopes: tuple[Scope, ...] = (Scope.READ, Scope.WRITE, Scope.ADMIN)
    expires_seconds: int = 12 * 3600
    description: str = ""


class Token(Entity):
    user_id: str
    user_name: str
    expires_at: datetime
    description: str = ""
    scopes: tuple[Scope, ...] = ()


class IssuedToken(Message):
    """`secret` is shown once: `Authorization: Bearer {secret}`."""

    token: Token
    secret: str


class CheckToken(Message):
    """The gateway asks who a bearer is."""

    token_id: str
    secret_sha256: str


class Principal(Message):
    """Who asks, as every owner sees it."""

    principal: str
    """`user:{id}`"""
    user_name: str
    token_id: str
    scopes: tuple[Scope, ...]
    expires_at: datetime


class EventReader(Entity):
    """An outside system with read-only credentials for the event stream."""

    name: str
    owners: tuple[Owner, ...] = ()
    """Whose facts it may follow."""
    public_key: str = ""


class CreateEventReader(Message):
    name: str
    owners: tuple[Owner, ...] = ()
    """Empty: all."""


class EventReaderCredentials(Message):
    """Shown once."""

    reader: EventReader
    creds: str
    """Text of a NATS .creds file."""
    servers: tuple[str, ...]
    consumers: dict[str, str]
    """Stream → the durable consumer to fetch from."""
    ca_pem: str = ""
    inbox_prefix: str = ""


CREATE_USER = Call("inventory.user.create", CreateUser, User, mutates=True)
CHANGE_PASSWORD = Call("inventory.user.change_password", ChangePassword, Done, mutates=True)
DELETE_USER = Call("inventory.user.delete", DeleteById, Done, mutates=True)
GET_USER = Call("inventory.user.get", GetById, User)
LIST_USERS = Call("inventory.user.list", ListQuery, Page)
LOGIN = Call("inventory.token.login", Login, IssuedToken)
DELETE_TOKEN = Call("inventory.token.delete", DeleteById, Done, mutates=True)
LIST_TOKENS = Call("inventory.token.list", ListQuery, Page)
CHECK_TOKEN = Call("inventory.token.check", CheckToken, Principal)

CREATE_EVENT_READER = Call("inventory.reader.create", CreateEventReader, EventReaderCredentials, mutates=True)
DELETE_EVENT_READER = Call("inventory.reader.delete", DeleteById, Done, mutates=True)
LIST_EVENT_READERS = Call("inventory.reader.list", ListQuery, Page)

USER_CHANGED = Fact("fact.inventory.user.{id}.changed", User)
USER_DELETED = Fact("fact.inventory.user.{id}.deleted", User)
TOKEN_CHANGED = Fact("fact.inventory.token.{id}.changed", Token)
TOKEN_DELETED = Fact("fact.inventory.token.{id}.deleted", Token)
READER_CHANGED = Fact("fact.inventory.reader.{id}.changed", EventReader)
READER_DELETED = Fact("fact.inventory.reader.{id}.deleted", EventReader)
