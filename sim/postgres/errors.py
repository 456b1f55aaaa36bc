"""What the database raises: asyncpg's own exceptions with PostgreSQL's words, and the two that are only ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

if TYPE_CHECKING:
    from sim.postgres.transactions import Transaction

E = TypeVar("E", bound=asyncpg.PostgresError)


class Unsupported(Exception):
    """A statement uses what this database does not have: it must learn it before its answers can be believed."""

    def __init__(self, what: str, statement: str = "") -> None:
        super().__init__(
            f"the simulation's PostgreSQL does not have {what}" + (f":\n{statement}" if statement else "")
        )
        self.what = what


class Blocked(Exception):
    """Somebody else holds what the statement needs: it is undone, waits for their end and begins again."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__("waits for another transaction")
        self.holder = holder


def postgres(kind: type[E], message: str, **fields: Any) -> E:
    """An exception as asyncpg makes it from the server's words; `fields` are e.g. constraint_name, table_name."""
    error = kind(message)
    error.severity = "ERROR"
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def undefined(message: str) -> asyncpg.PostgresError:
    return postgres(asyncpg.UndefinedFunctionError, message)


def mismatch(message: str) -> asyncpg.PostgresError:
    return postgres(asyncpg.DatatypeMismatchError, message)


def unreadable(type_name: str, text: str) -> asyncpg.PostgresError:
    message = f'invalid input syntax for type {type_name}: "{text}"'
    if type_name == "timestamp with time zone":
        return postgres(asyncpg.InvalidDatetimeFormatError, message)
    return postgres(asyncpg.InvalidTextRepresentationError, message)
