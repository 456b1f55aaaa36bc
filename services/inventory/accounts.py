"""Local accounts and tokens: argon2id for passwords, random secrets of which only the hash is kept."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from msgspec.structs import replace

from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.store import TOKENS, USERS, TokenPrivate, UserPrivate
from volery.contracts.account import (
    CHANGE_PASSWORD,
    CHECK_TOKEN,
    CREATE_USER,
    DELETE_TOKEN,
    DELETE_USER,
    GET_USER,
    LIST_TOKENS,
    LIST_USERS,
    LOGIN,
    ChangePassword,
    CheckToken,
    CreateUser,
    IssuedToken,
    Login,
    Principal,
    Token,
    User,
)
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Stale, Taken

part = Part()
hasher = PasswordHasher()
NOBODY = hasher.hash("nobody has this password")
"""Verified for names that don't exist, so that both refusals take the same time."""

MIN_PASSWORD = 12
MAX_PASSWORD = 1024
MAX_TOKEN_SECONDS = 366 * 86400


def check_password(password: str) -> None:
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise invalid(f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} characters", field="password")


async def make_user(inv: Inventory, ask: CreateUser, caller: Caller | None) -> User:
    checks.name(ask.name)
    checks.text(ask.full_name, "full_name")
    check_password(ask.password)
    now = utc_now()
    user = User(
        id=new_id(), revision=1, created_at=now, updated_at=now, name=ask.name, full_name=ask.full_name
    )
    private = UserPrivate(password_hash=await asyncio.to_thread(hasher.hash, ask.password))
    try:
        await inv.core.commit(USERS.insert(user, private), caller=caller, answer=user)
    except Taken:
        raise name_taken("user", ask.name) from None
    return user


async def ensure_admin(inv: Inventory) -> None:
    """The first administrator, from the password file that set-up left for us."""
    if not inv.config.admin_password_file or await inv.store.users():
        return
    password = Path(inv.config.admin_password_file).read_text().strip()
    with suppress(Refused):  # another replica was first
        await make_user(inv, CreateUser(name="admin", password=password, full_name="Administrator"), None)


@part.answers(CREATE_USER)
async def create_user(inv: Inventory, ask: CreateUser, caller: Caller) -> User:
    return await make_user(inv, ask, caller)


@part.answers(CHANGE_PASSWORD)
async def change_password(inv: Inventory, ask: ChangePassword, caller: Caller) -> Done:
    check_password(ask.password)
    row = await USERS.get(inv.core.pool, ask.id)
    own = caller.principal == f"user:{ask.id}"
    if own and not await _verified(row.private.password_hash, ask.current_password):
        raise Refused(Kind.FORBIDDEN, "the current password is not right; nothing was changed")
    private = replace(row.private, password_hash=await asyncio.to_thread(hasher.hash, ask.password))
    await inv.core.commit(USERS.update(row, row.public, private), caller=caller, answer=Done())
    return Done()


@part.answers(DELETE_USER)
async def delete_user(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    row = await USERS.get(inv.core.pool, ask.id)
    checks.revision(row.public, ask.if_revision, "user")
    if caller.principal == f"user:{ask.id}":
        raise conflict(
            "nobody can delete the account they are logged in with; let another administrator do it"
        )
    tokens = await TOKENS.where(inv.core.pool, "user_id = $1", ask.id)
    await inv.core.commit(
        USERS.delete(row), *(TOKENS.delete(token) for token in tokens), caller=caller, answer=Done()
    )
    return Done()


@part.answers(GET_USER)
async def get_user(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await USERS.raw(inv.core.pool, ask.id)


@part.answers(LIST_USERS)
async def list_users(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, USERS, ask)


async def _verified(password_hash: str, password: str) -> bool:
    try:
        return await asyncio.to_thread(hasher.verify, password_hash, password)
    except VerificationError:
        return False


@part.answers(LOGIN)
async def login(inv: Inventory, ask: Login, caller: Caller) -> IssuedToken:
    checks.between(ask.expires_seconds, 60, MAX_TOKEN_SECONDS, "expires_seconds", "seconds")
    checks.text(ask.description, "description")
    row = await inv.store.user_by_name(ask.name)
    right = await _verified(row.private.password_hash if row else NOBODY, ask.password)
    if row is None or not right or not row.public.enabled:
        raise Refused(Kind.UNAUTHENTICATED, "name or password is wrong, or the account is disabled")
    now = utc_now()
    secret = secrets.token_urlsafe(32)
    token = Token(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        user_id=row.id,
        user_name=row.public.name,
        expires_at=now + timedelta(seconds=ask.expires_seconds),
        description=ask.description,
        scopes=ask.scopes,
    )
    private = TokenPrivate(secret_sha256=hashlib.sha256(secret.encode()).hexdigest())
    await inv.core.commit(TOKENS.insert(token, private))
    return IssuedToken(token=token, secret=f"vol_{token.id}_{secret}")


@part.answers(CHECK_TOKEN)
async def check_token(inv: Inventory, ask: CheckToken, caller: Caller) -> Principal:
    row = await TOKENS.find(inv.core.pool, ask.token_id)
    if row is None or not hmac.compare_digest(row.private.secret_sha256, ask.secret_sha256):
        raise Refused(Kind.UNAUTHENTICATED, "this token is not known here; log in again")
    if row.public.expires_at <= utc_now():
        raise Refused(Kind.UNAUTHENTICATED, f"this token expired at {row.public.expires_at}; log in again")
    user = await USERS.find(inv.core.pool, row.public.user_id)
    if user is None or not user.public.enabled:
        raise Refused(Kind.UNAUTHENTICATED, "the account of this token is disabled or gone")
    return Principal(
        principal=f"user:{user.id}",
        user_name=user.public.name,
        token_id=row.id,
        scopes=row.public.scopes,
        expires_at=row.public.expires_at,
    )


@part.answers(DELETE_TOKEN)
async def delete_token(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    row = await TOKENS.get(inv.core.pool, ask.id)
    await inv.core.commit(TOKENS.delete(row), caller=caller, answer=Done())
    return Done()


@part.answers(LIST_TOKENS)
async def list_tokens(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, TOKENS, ask)


@part.every(3600)
async def forget_expired(inv: Inventory) -> None:
    for row in await inv.store.expired_tokens():
        try:
            await inv.core.commit(TOKENS.delete(row))
        except Stale:
            continue
