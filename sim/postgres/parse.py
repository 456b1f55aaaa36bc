"""SQL text to sqlglot's trees, and the discipline that nothing in a tree is overlooked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import asyncpg
import sqlglot
from sqlglot import exp

from sim.postgres.errors import Unsupported, postgres

_FUNCTION = re.compile(
    r"create function (\w+)\(\) returns trigger language plpgsql as \$\$\s*begin\s+"
    r"perform pg_notify\((.*?)\);\s*return null;\s*end \$\$;",
    re.S,
)
"""The one kind of function that there is: it tells something of each row."""


@dataclass(frozen=True, slots=True)
class Teller:
    """A trigger function that does nothing but notify."""

    name: str
    channel: exp.Expr
    payload: exp.Expr


Statement = exp.Expr | Teller


KNOWN: dict[str, tuple[Statement, ...]] = {}
"""What was parsed before, in this process or in one that it is a fork of; the newest last."""


def statements(text: str) -> tuple[Statement, ...]:
    """The statements of a script. Raises PostgresSyntaxError, Unsupported."""
    found = KNOWN.get(text)
    if found is None:
        found = KNOWN[text] = _script(text)
    return found


def _script(text: str) -> tuple[Statement, ...]:
    found: list[Statement] = []
    at = 0
    for match in _FUNCTION.finditer(text):
        found += _parsed(text[at : match.start()])
        (call,) = _parsed(f"select tell({match[2]})")
        channel, payload = call.expressions[0].expressions
        found.append(Teller(match[1], channel, payload))
        at = match.end()
    return (*found, *_parsed(text[at:]))


def _parsed(text: str) -> list[exp.Expr]:
    if "create function" in text:
        raise Unsupported("functions other than triggers that notify", text)
    try:
        trees = [tree for tree in sqlglot.parse(text, dialect="postgres") if tree is not None]
    except sqlglot.errors.SqlglotError as error:
        raise postgres(asyncpg.PostgresSyntaxError, f"can't be parsed: {error}") from None
    for tree in trees:
        if isinstance(tree, exp.Command):
            raise Unsupported("this statement", text)
    return [tree for tree in trees if not isinstance(tree, exp.Semicolon)]


def name(node: Any) -> str:
    """An identifier as PostgreSQL folds it; "" for none."""
    if node is None:
        return ""
    if isinstance(node, str):
        return node.lower()
    if isinstance(node, exp.Identifier):
        return str(node.this) if node.args.get("quoted") else str(node.this).lower()
    if isinstance(node, exp.Column | exp.Table | exp.Schema | exp.TableAlias | exp.Var):
        return name(node.this)
    raise Unsupported(f"the name {node!r}")


def only(node: exp.Expr, *handled: str) -> None:
    """Refuse a tree with a part that the caller does not look at."""
    for part, value in node.args.items():
        if value and part not in handled:
            raise Unsupported(f"`{part}` in {type(node).__name__}: {node.sql(dialect='postgres')}")


def conjuncts(node: exp.Expr | None) -> list[exp.Expr]:
    """The conditions that an AND joins."""
    if node is None:
        return []
    if isinstance(node, exp.Paren):
        return conjuncts(node.this)
    if isinstance(node, exp.And):
        return [*conjuncts(node.left), *conjuncts(node.right)]
    return [node]
