"""INSERT, UPDATE, DELETE. Each sees the rows as they were when the statement began, and writes a row at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import parse, writing
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.expressions import assigned, condition, expression
from sim.postgres.parse import conjuncts, only
from sim.postgres.scope import COMMAND, Compiled, Frame, Query, Run, Scope, Unit, refuse, table_source
from sim.postgres.select import Rows, projection
from sim.postgres.sources import Item, from_items, joined
from sim.postgres.tables import Index, Table, Values


@dataclass(frozen=True, slots=True)
class Modify:
    """`written` is where the command's memo has the number of rows."""

    query: Query
    written: int
    word: str


def _position(table: Table, name: str) -> int:
    try:
        return table.position(name)
    except ValueError:
        raise postgres(
            asyncpg.UndefinedColumnError, f'column "{name}" of relation "{table.name}" does not exist'
        ) from None


def _returning(scope: Scope, node: exp.Expr) -> list[tuple[str, Compiled]]:
    returning = node.args.get("returning")
    if returning is None:
        return []
    only(returning, "expressions")
    return projection(scope, returning.expressions)


def _modify(
    scope: Scope, outputs: list[tuple[str, Compiled]], write: Callable[[Frame], Iterable[None]], word: str
) -> Modify:
    """`write` yields after each written row, with the row in its slot."""
    memo, runs = scope.unit.memo(), [made.run for _, made in outputs]

    def run(f: Frame) -> Rows:
        rows: Rows = []
        written = 0
        for _ in write(f):
            written += 1
            if runs:
                rows.append(tuple([each(f) for each in runs]))
        f[COMMAND].memo[memo] = written
        return rows

    return Modify(Query(run, tuple((name, made.kind) for name, made in outputs)), memo, word)


# INSERT


def insert(node: exp.Insert, unit: Unit) -> Modify:
    only(node, "this", "expression", "conflict", "returning", "with_")
    target = node.this
    named = target.expressions if isinstance(target, exp.Schema) else []
    table = unit.table(target.this if isinstance(target, exp.Schema) else target)
    columns = [_position(table, parse.name(each)) for each in named] or list(range(len(table.columns)))
    values = _values(unit, table, columns, node.expression)
    scope = Scope(unit)
    source = scope.add(table_source(unit, table, table.name))
    slot = source.slot
    conflict = _conflict(unit, scope, table, node.args.get("conflict"))
    outputs = _returning(_only_target(scope), node)

    def write(f: Frame) -> Iterable[None]:
        command = f[COMMAND]
        for row in values(f):
            writing.check_row(table, row)
            if conflict is not None:
                hit = next((h for index in conflict.arbiters if (h := command.conflicting(index, row))), None)
                if hit is not None:
                    if conflict.update is not None and conflict.update(f, hit, row):
                        yield
                    continue
            writing.insert(command, table, row)
            f[slot] = row
            yield

    return _modify(scope, outputs, write, "INSERT 0")


def _only_target(scope: Scope) -> Scope:
    return Scope(scope.unit, None, scope.sources[:1])


def _defaults(unit: Unit, table: Table) -> list[Run]:
    def identity(f: Frame) -> int:
        table.counter += 1
        return table.counter

    def of(at: int) -> Run:
        if table.columns[at].identity:
            return identity
        return table.defaults[at] or (lambda f: None)

    return [of(at) for at in range(len(table.columns))]


def _values(
    unit: Unit, table: Table, columns: list[int], node: exp.Expr
) -> Callable[[Frame], Iterable[Values]]:
    """Whole rows: what the statement gives, defaults for the rest."""
    defaults = _defaults(unit, table)
    if isinstance(node, exp.Values):
        only(node, "expressions")
        rows = [_given(unit, table, columns, defaults, each.expressions) for each in node.expressions]
        return lambda f: [tuple([run(f) for run in row]) for row in rows]
    wants = tuple(table.columns[at].kind for at in columns)
    from sim.postgres.select import query

    found = query(node, unit, None, wants)
    if len(found.columns) > len(columns):
        raise postgres(asyncpg.PostgresSyntaxError, "INSERT has more expressions than target columns")
    here = unit.slot()
    runs = list(defaults)
    for place, (_, kind) in enumerate(found.columns):
        column = table.columns[columns[place]]
        _not_identity(column)
        runs[columns[place]] = assigned(_reading(here, place, kind), column.kind, column.name)

    def selected(f: Frame) -> Iterable[Values]:
        made = []
        for values in found.run(f):
            f[here] = values
            made.append(tuple([run(f) for run in runs]))
        return made

    return selected


def _reading(slot: int, at: int, kind: str) -> Compiled:
    return Compiled(lambda f: f[slot][at], kind)


def _not_identity(column: Any) -> None:
    if column.identity:
        raise postgres(
            asyncpg.GeneratedAlwaysError, f'cannot insert a non-DEFAULT value into column "{column.name}"'
        )


def _given(
    unit: Unit, table: Table, columns: list[int], defaults: list[Run], nodes: list[exp.Expr]
) -> list[Run]:
    if len(nodes) != len(columns):
        which = (
            "expressions than target columns"
            if len(nodes) > len(columns)
            else "target columns than expressions"
        )
        raise postgres(asyncpg.PostgresSyntaxError, f"INSERT has more {which}")
    runs = list(defaults)
    for at, node in zip(columns, nodes, strict=True):
        if isinstance(node, exp.Var) and parse.name(node) == "default":
            continue
        column = table.columns[at]
        _not_identity(column)
        runs[at] = assigned(expression(Scope(unit), node, column.kind), column.kind, column.name)
    return runs


@dataclass(frozen=True, slots=True)
class _Conflict:
    arbiters: list[Index]
    update: Callable[[Frame, Any, Values], bool] | None


def _conflict(unit: Unit, scope: Scope, table: Table, node: exp.OnConflict | None) -> _Conflict | None:
    if node is None:
        return None
    only(node, "expressions", "action", "conflict_keys", "where", "constraint")
    unit.steady = False  # it may meet a row that isn't committed yet
    arbiters = _arbiters(table, node)
    if parse.name(node.args["action"]) == "do nothing":
        return _Conflict(arbiters, None)
    (target,) = scope.sources
    excluded = table_source(unit, table, "excluded")
    scope.add(excluded)
    sets = _assignments(scope, table, node.expressions)
    where = node.args.get("where")
    test = condition(scope, where.this) if where is not None else None

    def update(f: Frame, row: Any, values: Values) -> bool:
        command = f[COMMAND]
        if command.changed(row):
            raise postgres(
                asyncpg.CardinalityViolationError,
                "ON CONFLICT DO UPDATE command cannot affect row a second time",
            )
        command.own(row)
        old = row.next
        f[target.slot], f[excluded.slot] = old, values
        if test is not None and test(f) is not True:
            return False
        new = _changed(f, old, sets)
        writing.update(command, row, old, new)
        f[target.slot] = new
        return True

    return _Conflict(arbiters, update)


def _arbiters(table: Table, node: exp.OnConflict) -> list[Index]:
    constraint = parse.name(node.args.get("constraint"))
    keys = [
        parse.name(each.this if isinstance(each, exp.Ordered) else each)
        for each in node.args.get("conflict_keys") or []
    ]
    if constraint:
        found = [index for index in table.constraints() if index.name == constraint]
    elif keys:
        wanted = {_position(table, key) for key in keys}
        found = [
            index for index in table.constraints() if set(index.columns) == wanted and index.where is None
        ]
    else:
        if table.exclusions:
            raise Unsupported("ON CONFLICT DO NOTHING on a table with exclusion constraints")
        return list(table.constraints())
    if not found:
        raise postgres(
            asyncpg.InvalidColumnReferenceError,
            "there is no unique or exclusion constraint matching the ON CONFLICT specification",
        )
    return found


# UPDATE and DELETE


def _assignments(scope: Scope, table: Table, nodes: list[exp.Expr]) -> list[tuple[int, Run]]:
    found = []
    for node in nodes:
        if (
            not isinstance(node, exp.EQ)
            or not isinstance(node.this, exp.Column)
            or node.this.args.get("table")
        ):
            raise refuse(node)
        at = _position(table, parse.name(node.this.this))
        column = table.columns[at]
        found.append(
            (at, assigned(expression(scope, node.expression, column.kind), column.kind, column.name))
        )
    return found


def _changed(f: Frame, old: Values, sets: list[tuple[int, Run]]) -> Values:
    new = list(old)
    for at, run in sets:
        new[at] = run(f)
    return tuple(new)


def _target(unit: Unit, node: exp.Expr, others: list[exp.Expr]) -> tuple[Scope, Table, list[Item]]:
    """The table that is written, last in the joins: what it is joined with may choose its rows by an index."""
    table = unit.table(node.this)
    alias = parse.name(node.this.args.get("alias")) or table.name
    scope = Scope(unit)
    items = []
    for other in others:
        items += from_items(scope, exp.Select(from_=exp.From(this=other)))
    source = table_source(unit, table, alias)
    scope.add(source)
    return scope, table, [*items, Item(source)]


def update(node: exp.Update, unit: Unit) -> Modify:
    only(node, "this", "expressions", "from_", "where", "returning", "with_")
    others = [node.args["from_"].this] if node.args.get("from_") is not None else []
    scope, table, items = _target(unit, node, others)
    sets = _assignments(scope, table, node.expressions)
    step = joined(scope, items, _where(node))
    outputs = _returning(scope, node)
    slot = items[-1].source.slot

    def write(f: Frame) -> Iterable[None]:
        command = f[COMMAND]
        for _ in step(f):
            row, old = f[slot + 1], f[slot]
            if command.changed(row):
                continue
            command.lock(row, key_only=True)
            new = _changed(f, old, sets)
            writing.update(command, row, old, new)
            f[slot] = new
            yield

    return _modify(scope, outputs, write, "UPDATE")


def delete(node: exp.Delete, unit: Unit) -> Modify:
    only(node, "this", "using", "where", "returning", "with_")
    scope, _, items = _target(unit, node, node.args.get("using") or [])
    step = joined(scope, items, _where(node))
    outputs = _returning(scope, node)
    slot = items[-1].source.slot

    def write(f: Frame) -> Iterable[None]:
        command = f[COMMAND]
        for _ in step(f):
            row, old = f[slot + 1], f[slot]
            if command.changed(row):
                continue
            writing.delete(command, row, old)
            yield

    return _modify(scope, outputs, write, "DELETE")


def _where(node: exp.Expr) -> list[exp.Expr]:
    where = node.args.get("where")
    return conjuncts(where.this if where is not None else None)
