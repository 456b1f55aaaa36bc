"""One statement, compiled once: its WITH, its arguments, what it answers and its command tag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import aggregates, dml, functions, logic, parse, types
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.parse import only
from sim.postgres.scope import COMMAND, Frame, Query, Scope, Unit
from sim.postgres.select import Rows, query
from sim.postgres.tables import Table
from sim.postgres.transactions import Command

REGISTERED = (aggregates, functions, logic)
"""Imported for the expressions that they compile."""


@dataclass(frozen=True, slots=True)
class Plan:
    slots: int
    takers: tuple[types.Convert, ...]
    kinds: tuple[str, ...]
    """Of the arguments."""
    columns: tuple[tuple[str, str], ...]
    run: Callable[[Frame], Rows]
    last: tuple[Callable[[Frame], Rows], ...]
    """Writing CTEs, which are carried out even when nothing reads them."""
    word: str
    written: int | None
    """Where the memo has how many rows were written; None: the rows that it answers count."""
    tables: tuple[Table, ...]
    """What it reads or writes."""
    steady: bool
    """While these tables' versions stay the same, it answers the same if it wrote nothing."""

    def arguments(self, values: tuple[Any, ...]) -> list[Any]:
        """As asyncpg takes them. Raises DataError, InterfaceError."""
        if len(values) != len(self.takers):
            raise asyncpg.InterfaceError(
                f"the server expects {len(self.takers)} argument{'s' * (len(self.takers) != 1)} for this query, "
                f"{len(values)} {'was' if len(values) == 1 else 'were'} passed"
            )
        number, taken = 0, list(values)
        try:
            for number, take in enumerate(self.takers):
                if taken[number] is not None:
                    taken[number] = take(taken[number])
        except (TypeError, ValueError, OverflowError) as error:
            raise asyncpg.DataError(
                f"invalid input for query argument ${number + 1}: {values[number]!r} ({error})"
            ) from None
        return taken

    def execute(self, command: Command, arguments: list[Any]) -> tuple[Rows, str]:
        """Rows and tag. Raises Blocked."""
        frame: Frame = [arguments, command, *(None,) * (self.slots - 2)]
        rows = self.run(frame)
        for each in self.last:
            each(frame)
        for check in command.checks:
            check()
        count = len(rows) if self.written is None else command.memo[self.written]
        return rows, f"{self.word} {count}"


def compile_statement(node: exp.Expr, tables: dict[str, Table], views: dict[str, exp.Expr]) -> Plan:
    """A query or a statement that writes rows. Raises Unsupported, and what PostgreSQL says of a wrong one."""
    unit = Unit(tables, views, query)
    last = []
    with_ = node.args.get("with_")
    if with_ is not None:
        only(with_, "expressions")
        for cte in with_.expressions:
            made, writes = _cte(unit, cte)
            if writes:
                last.append(made)
    found, written, word = _main(unit, node)
    kinds = _arguments(unit)
    return Plan(
        unit.slots, tuple(types.taker(kind) for kind in kinds), kinds, found.columns, found.run, tuple(last), word, written,
        tuple(unit.used), unit.steady,
    )  # fmt: skip


def _arguments(unit: Unit) -> tuple[str, ...]:
    kinds = []
    for number in range(1, max(unit.arguments, default=0) + 1):
        kind = unit.arguments.get(number, "unknown")
        if kind == "unknown":
            raise postgres(
                asyncpg.IndeterminateDatatypeError, f"could not determine data type of parameter ${number}"
            )
        kinds.append(kind)
    return tuple(kinds)


def _body(unit: Unit, node: exp.Expr) -> Query | dml.Modify:
    if isinstance(node, exp.Insert):
        return dml.insert(node, unit)
    if isinstance(node, exp.Update):
        return dml.update(node, unit)
    if isinstance(node, exp.Delete):
        return dml.delete(node, unit)
    return query(node, unit, None)


def _main(unit: Unit, node: exp.Expr) -> tuple[Query, int | None, str]:
    made = _body(unit, node)
    if isinstance(made, dml.Modify):
        return made.query, made.written, made.word
    return made, None, "SELECT"


def _cte(unit: Unit, node: exp.CTE) -> tuple[Callable[[Frame], Rows], bool]:
    """Computed where it is first read, at most once."""
    only(node, "this", "alias", "materialized")
    alias = node.args["alias"]
    if alias.args.get("columns"):
        raise Unsupported("names for a CTE's columns")
    if node.this.args.get("with_"):
        raise Unsupported("WITH inside of a statement")
    made = _body(unit, node.this)
    inner = made.query if isinstance(made, dml.Modify) else made
    memo = unit.memo()

    def once(f: Frame) -> Rows:
        known = f[COMMAND].memo
        if memo not in known:
            known[memo] = inner.run(f)
        rows: Rows = known[memo]
        return rows

    unit.ctes[parse.name(alias.this)] = Query(once, inner.columns)
    return once, isinstance(made, dml.Modify)


def constant(node: exp.Expr, kind: str, tables: dict[str, Table]) -> Callable[[Frame], Any]:
    """An expression without sources, as a column's default is."""
    from sim.postgres.expressions import assigned, expression

    unit = Unit(tables, {}, query)
    return assigned(expression(Scope(unit), node, kind), kind, "default")
