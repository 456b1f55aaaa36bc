"""SELECT: rows joined, grouped, windowed, projected, ordered, cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import parse, types
from sim.postgres.aggregates import WindowCall, aggregates, descends, sort_by
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.expressions import condition, converted, expression
from sim.postgres.parse import conjuncts, only
from sim.postgres.scope import COMMAND, Compiled, Frame, Grouping, Query, Run, Scope, Source, Unit, refuse
from sim.postgres.sources import Item, Step, from_items, joined

Rows = list[tuple[Any, ...]]
Frames = Callable[[Frame], Iterable[Frame]]
_PARTS = (
    "expressions", "from_", "joins", "where", "group", "having", "order", "limit", "offset", "distinct", "locks",
)  # fmt: skip


def query(node: exp.Expr, unit: Unit, parent: Scope | None, wants: tuple[str, ...] = ()) -> Query:
    """A query without its WITH. `wants` are types for literals and arguments that it gives as they are."""
    if isinstance(node, exp.Subquery) and not node.args.get("alias"):
        only(node, "this")
        node = node.this
    if not isinstance(node, exp.Select):
        raise refuse(node)
    if node.args.get("with_") and parent is not None:
        raise Unsupported("WITH inside of a statement")
    only(node, *_PARTS, "with_")
    scope = Scope(unit, parent)
    items = from_items(scope, node)
    where = node.args.get("where")
    step = joined(scope, items, conjuncts(where.this if where is not None else None))
    if node.args.get("locks"):
        scope.unit.steady = False
        step = _locked(step, node, items)
    frames = _frames(step)
    if _groups(node):
        frames = _grouped(scope, node, frames)
    scope.windows = (unit.slot(), [])
    outputs = projection(scope, node.expressions, wants)
    order = _order(scope, node.args.get("order"), outputs)
    if scope.grouping is not None:
        frames = _folded(scope, node, frames)
    if scope.windows[1]:
        frames = _windowed(frames, *scope.windows)
    run = _project(frames, [made.run for _, made in outputs], order)
    if node.args.get("distinct"):
        run = _distinct(node, run, order)
    run = _cut(scope, node, run)
    return Query(run, tuple((name, made.kind) for name, made in outputs))


def projection(
    scope: Scope, nodes: list[exp.Expr], wants: tuple[str, ...] = ()
) -> list[tuple[str, Compiled]]:
    """What SELECT or RETURNING gives, with names."""
    outputs: list[tuple[str, Compiled]] = []
    for node in nodes:
        if isinstance(node, exp.Star) or (isinstance(node, exp.Column) and isinstance(node.this, exp.Star)):
            outputs += _all_columns(scope, parse.name(node.args.get("table")))
            continue
        inner = node.this if isinstance(node, exp.Alias) else node
        want = wants[len(outputs)] if len(outputs) < len(wants) else "text"
        outputs.append((_output_name(node), _known(expression(scope, inner, want))))
    return outputs


def _known(made: Compiled) -> Compiled:
    return converted(made, "text") if made.kind == "unknown" else made


def _all_columns(scope: Scope, source: str) -> list[tuple[str, Compiled]]:
    found = []
    for each in scope.sources:
        if not source or each.alias == source:
            for name, _ in each.columns:
                node = exp.column(
                    exp.to_identifier(name, quoted=True), exp.to_identifier(each.alias, quoted=True)
                )
                found.append((name, scope.column(node)))
    if not found:
        raise postgres(asyncpg.UndefinedTableError, f'missing FROM-clause entry for table "{source}"')
    return found


_NAMES: dict[type[exp.Expr], str] = {
    exp.Case: "case",
    exp.CurrentTimestamp: "now",
    exp.Coalesce: "coalesce",
    exp.StrPosition: "position",
}


def _output_name(node: exp.Expr) -> str:
    if isinstance(node, exp.Alias):
        return parse.name(node.args["alias"])
    if isinstance(node, exp.Column):
        return parse.name(node.this)
    if isinstance(node, exp.Cast):
        inner = _output_name(node.this)
        return inner if inner != "?column?" else types.declared(node.args["to"])
    if isinstance(node, exp.Paren):
        return _output_name(node.this)
    if isinstance(node, exp.Window | exp.Filter):
        return _output_name(node.this)
    if isinstance(node, exp.Subquery) and isinstance(node.this, exp.Select):
        return _output_name(node.this.expressions[0])
    if isinstance(node, exp.Exists):
        return "exists"
    if isinstance(node, exp.Anonymous):
        return parse.name(node.this)
    if type(node) in _NAMES:
        return _NAMES[type(node)]
    if isinstance(node, exp.Func) and not isinstance(node, exp.Binary | exp.Connector):
        return node.sql_name().lower()
    return "?column?"


def _frames(step: Step) -> Frames:
    def frames(f: Frame) -> Iterable[Frame]:
        for _ in step(f):
            yield f

    return frames


# Locks


def _locked(step: Step, node: exp.Select, items: list[Item]) -> Step:
    """Whatever the order: a statement that has to wait for one row lets go of all of them meanwhile."""
    (lock,) = node.args["locks"]
    only(lock, "update", "wait")
    slots = [item.source.slot for item in items]
    if any(item.source.table is None or item.outer for item in items) or _groups(node):
        raise refuse(node)
    for_update, skips = bool(lock.args.get("update")), lock.args.get("wait") is False
    if skips or node.args.get("limit"):
        raise Unsupported("SKIP LOCKED, or row locks in a limited query", node.sql(dialect="postgres"))

    def locked(f: Frame) -> Any:
        command = f[COMMAND]
        for _ in step(f):
            for slot in slots:
                if for_update:
                    command.own(f[slot + 1])
                else:
                    command.share(f[slot + 1], all_of_it=True)
            yield

    return locked


# Groups


def _groups(node: exp.Select) -> bool:
    if node.args.get("group") is not None or node.args.get("having") is not None:
        return True
    return any(aggregates(each) for each in node.expressions)


def _grouped(scope: Scope, node: exp.Select, frames: Frames) -> Frames:
    """Has the scope compile expressions over groups from here on. The frames that it gives are one per row, still."""
    group = node.args.get("group")
    keys: list[Run] = []
    columns: set[tuple[int, int]] = set()
    if group is not None:
        only(group, "expressions")
        for each in group.expressions:
            keys.append(expression(scope, each).run)
            if isinstance(each, exp.Column):
                found = scope.find(parse.name(each.args.get("table")), parse.name(each.this))
                assert found is not None
                columns.add((found[0].slot, found[1]))
    whole = {s.slot for s in scope.sources if _by_primary(s, columns)}
    scope.grouping = Grouping(scope.unit.slot(), columns, whole)
    gives_none = group is None

    def grouped(f: Frame) -> Iterable[Frame]:
        groups: dict[tuple[Any, ...], list[Frame]] = {}
        for row in frames(f):
            groups.setdefault(tuple(key(row) for key in keys), []).append(row.copy())
        if not groups and gives_none:
            groups[()] = []
        return [[key, members] for key, members in groups.items()]

    return grouped


def _by_primary(source: Source, columns: set[tuple[int, int]]) -> bool:
    table = source.table
    return (
        table is not None and bool(table.primary) and all((source.slot, c) in columns for c in table.primary)
    )


def _folded(scope: Scope, node: exp.Select, groups: Frames) -> Frames:
    """One frame per group, with its aggregates in their slot."""
    grouping = scope.grouping
    assert grouping is not None
    having = node.args.get("having")
    test = condition(scope, having.this) if having is not None else None
    slot, found = grouping.slot, grouping.aggregates

    def folded(f: Frame) -> Iterable[Frame]:
        for _, members in groups(f):
            row = members[0] if members else f.copy()
            row[slot] = [each.over([each.take(member) for member in members]) for each in found]
            if test is None or test(row) is True:
                yield row

    return folded


def _windowed(frames: Frames, slot: int, calls: list[WindowCall]) -> Frames:
    def windowed(f: Frame) -> Iterable[Frame]:
        rows = [row.copy() for row in frames(f)]
        results = [call.over(rows) for call in calls]
        for number, row in enumerate(rows):
            row[slot] = [each[number] for each in results]
        return rows

    return windowed


# Output

Order = list[tuple[Run | int, bool]]
"""By an expression or an output column; whether descending."""


def _order(scope: Scope, order: exp.Order | None, outputs: list[tuple[str, Compiled]]) -> Order:
    names = [name for name, _ in outputs]
    found: Order = []
    for item in order.expressions if order is not None else []:
        down, key = descends(item), item.this
        if isinstance(key, exp.Literal) and not key.is_string:
            found.append((int(key.this) - 1, down))
        elif isinstance(key, exp.Column) and not key.args.get("table") and parse.name(key.this) in names:
            found.append((names.index(parse.name(key.this)), down))
        else:
            found.append((expression(scope, key).run, down))
    return found


def _project(frames: Frames, outputs: list[Run], order: Order) -> Callable[[Frame], Rows]:
    if not order:
        if len(outputs) == 1:
            (only_one,) = outputs
            return lambda f: [(only_one(row),) for row in frames(f)]
        return lambda f: [tuple([run(row) for run in outputs]) for row in frames(f)]

    def ordered(f: Frame) -> Rows:
        rows = []
        for row in frames(f):
            values = tuple([run(row) for run in outputs])
            rows.append((values, [values[k] if isinstance(k, int) else k(row) for k, _ in order]))
        sort_by(rows, itemgetter(1), [down for _, down in order])
        return [values for values, _ in rows]

    return ordered


def _distinct(node: exp.Select, run: Callable[[Frame], Rows], order: Order) -> Callable[[Frame], Rows]:
    only(node.args["distinct"])
    if not all(isinstance(key, int) for key, _ in order):
        raise postgres(
            asyncpg.InvalidColumnReferenceError,
            "for SELECT DISTINCT, ORDER BY expressions must appear in select list",
        )
    return lambda f: list(dict.fromkeys(run(f)))


def _cut(scope: Scope, node: exp.Select, run: Callable[[Frame], Rows]) -> Callable[[Frame], Rows]:
    bounds: list[Run | None] = []
    for part in ("offset", "limit"):
        bound = node.args.get(part)
        bounds.append(None)
        if bound is not None:
            only(bound, "expression")
            bounds[-1] = converted(expression(scope, bound.expression, "int8"), "int8").run
    skip, most = bounds
    if skip is None and most is None:
        return run

    def cut(f: Frame) -> Rows:
        first = (skip(f) or 0) if skip is not None else 0
        count = most(f) if most is not None else None
        return list(itertools.islice(run(f), first, None if count is None else first + count))

    return cut
