"""FROM: how the rows of tables, queries and functions are found and joined.

A step is a generator over the frame: each time it yields, its source's slot holds the next row. Conditions are tested as
soon as everything that they read is there; an equality with something known before is looked up in an index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import parse, types
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.expressions import condition, expression, subquery
from sim.postgres.functions import json_elements
from sim.postgres.parse import conjuncts, only
from sim.postgres.scope import COMMAND, Compiled, Frame, Query, Run, Scope, Source, refuse, table_source
from sim.postgres.tables import Row, Table

Step = Callable[[Frame], Iterator[None]]
Candidates = Callable[[Frame], Iterable[Row]]


@dataclass(slots=True)
class Condition:
    """One conjunct, and which of the frame's slots it reads."""

    node: exp.Expr
    run: Run
    reads: set[int]


@dataclass(slots=True)
class Item:
    """One item of FROM while it is being joined."""

    source: Source
    rows: Callable[[Frame], Iterable[Any]] | None = None
    """Of what isn't a table."""
    outer: bool = False
    """LEFT JOIN"""
    on: list[exp.Expr] = field(default_factory=list)
    kept: bool = False
    """Its rows are computed once per statement, so that a hash of them pays."""


def split(scope: Scope, nodes: list[exp.Expr]) -> list[Condition]:
    found = []
    for node in nodes:
        with scope.unit.recording() as seen:
            run = condition(scope, node)
        found.append(Condition(node, run, set(seen)))
    return found


# Where candidates come from


def _equality(scope: Scope, item: Source, node: exp.Expr, known: set[int]) -> tuple[int, Compiled] | None:
    """The column of `item` and what it must equal, if that is known before."""
    if not isinstance(node, exp.EQ) or isinstance(node.right, exp.Any):
        return None
    for one, other in ((node.left, node.right), (node.right, node.left)):
        at = _own_column(scope, item, one)
        if at is None:
            continue
        with scope.unit.recording() as seen:
            made = expression(scope, other, item.columns[at][1])
        if item.slot not in seen and all(s in known or s < item.slot for s in seen) and -1 not in seen:
            return at, made
    return None


def _own_column(scope: Scope, item: Source, node: exp.Expr) -> int | None:
    if not isinstance(node, exp.Column):
        return None
    found = scope.find(parse.name(node.args.get("table")), parse.name(node.this))
    return found[1] if found is not None and found[0] is item and not item.scalar else None


def _membership(
    scope: Scope, item: Source, node: exp.Expr
) -> tuple[int, Callable[[Frame], Iterable[Any]]] | None:
    """`column = any(array)` and `column in (query)`, where the many are known without a row of `item`."""
    if isinstance(node, exp.EQ) and isinstance(node.right, exp.Any):
        at = _own_column(scope, item, node.left)
        if at is None:
            return None
        with scope.unit.recording() as seen:
            array = expression(scope, node.right.this.unnest(), item.columns[at][1] + "[]")
        return None if seen else (at, lambda f: dict.fromkeys(array.run(f) or ()))
    if isinstance(node, exp.In) and node.args.get("query") is not None:
        at = _own_column(scope, item, node.this)
        if at is None:
            return None
        with scope.unit.recording() as seen:
            values, _ = subquery(scope, node.args["query"])
        if any(slot <= item.slot for slot in seen):
            return None
        return at, lambda f: [value for (value,) in values(f)]
    return None


def candidates(scope: Scope, source: Source, conditions: list[Condition], known: set[int]) -> Candidates:
    """The rows of a table among which those are that meet the conditions: by an index, or all."""
    table = source.table
    assert table is not None
    equal: dict[int, Run] = {}
    for each in conditions:
        found = _equality(scope, source, each.node, known)
        if found is not None:
            equal.setdefault(found[0], found[1].run)
    for index in table.constraints():
        if equal and index.where is None and set(index.columns) <= set(equal):
            return _lookup(table, index.columns, [equal[c] for c in index.columns])
    for column, run in equal.items():
        if table.indexed(column):
            return _lookup(table, (column,), [run])
    for each in conditions:
        many = _membership(scope, source, each.node)
        if many is not None and table.indexed(many[0]):
            return _lookups(table, many[0], many[1])
    return lambda f: list(table.rows)


def _lookup(table: Table, columns: tuple[int, ...], runs: list[Run]) -> Candidates:
    index = table.lookup(columns)
    if len(runs) == 1:
        (run,) = runs
        return lambda f: tuple(index.of(run(f)))
    return lambda f: tuple(index.of(tuple([run(f) for run in runs])))


def _lookups(table: Table, column: int, many: Callable[[Frame], Iterable[Any]]) -> Candidates:
    index = table.lookup((column,))
    return lambda f: list(itertools.chain.from_iterable(index.of(key) for key in many(f)))


# Steps


def table_step(source: Source, found: Candidates, tests: list[Run]) -> Step:
    slot = source.slot
    test = _all(tests)

    def step(f: Frame) -> Iterator[None]:
        command = f[COMMAND]
        for row in found(f):
            values = row.data if row.writer is None else command.see(row)
            if values is None:
                continue
            f[slot], f[slot + 1] = values, row
            if test is None or test(f) is True:
                yield

    return step


def _all(tests: list[Run]) -> Run | None:
    if not tests:
        return None
    if len(tests) == 1:
        return tests[0]
    return lambda f: all(test(f) is True for test in tests)


def rows_step(source: Source, rows: Callable[[Frame], Iterable[Any]], tests: list[Run]) -> Step:
    slot, test = source.slot, _all(tests)

    def step(f: Frame) -> Iterator[None]:
        for values in rows(f):
            f[slot] = values
            if test is None or test(f) is True:
                yield

    return step


def _hashed(
    scope: Scope, item: Item, tests: list[Condition], known: set[int]
) -> Callable[[Frame], Iterable[Any]]:
    """The rows of a kept item that an equality chooses, or all."""
    rows = item.rows
    assert rows is not None
    if not item.kept:
        return rows
    found = next((e for each in tests if (e := _equality(scope, item.source, each.node, known))), None)
    if found is None:
        return rows
    at, wanted = found
    memo = scope.unit.memo()

    def chosen(f: Frame) -> Iterable[Any]:
        table: dict[Any, list[Any]] | None = f[COMMAND].memo.get(memo)
        if table is None:
            table = {}
            for values in rows(f):
                table.setdefault(values[at], []).append(values)
            f[COMMAND].memo[memo] = table
        return table.get(wanted.run(f), ())

    return chosen


def _nested(outer: Step, inner: Step) -> Step:
    def step(f: Frame) -> Iterator[None]:
        for _ in outer(f):
            yield from inner(f)

    return step


def _left(outer: Step, inner: Step, source: Source) -> Step:
    slot, nothing = source.slot, (None,) * len(source.columns)

    def step(f: Frame) -> Iterator[None]:
        for _ in outer(f):
            matched = False
            for _ in inner(f):
                matched = True
                yield
            if not matched:
                f[slot] = nothing
                yield

    return step


def _tested(step: Step, tests: list[Run]) -> Step:
    test = _all(tests)
    if test is None:
        return step

    def filtered(f: Frame) -> Iterator[None]:
        for _ in step(f):
            if test(f) is True:
                yield

    return filtered


def _once(f: Frame) -> Iterator[None]:
    yield


def joined(scope: Scope, items: list[Item], where: list[exp.Expr], bound: set[int] | None = None) -> Step:
    """All items joined and the conditions tested. `bound` are slots of this query that are filled before."""
    pending = split(scope, where)
    mine = {item.source.slot for item in items}
    known: set[int] = set(bound or ())
    step: Step = _once
    for item in items:
        reachable = known | {item.source.slot}
        ready = [each for each in pending if not (each.reads & mine) - reachable]
        pending = [each for each in pending if each not in ready]
        tests = split(scope, item.on)
        if not item.outer:
            tests, ready = tests + ready, []
        inner = _step(scope, item, tests, known)
        step = (
            _left(step, inner, item.source)
            if item.outer
            else inner
            if step is _once
            else _nested(step, inner)
        )
        step = _tested(step, [each.run for each in ready])
        known = reachable
    return _tested(step, [each.run for each in pending])


def _step(scope: Scope, item: Item, tests: list[Condition], known: set[int]) -> Step:
    runs = [each.run for each in tests]
    if item.rows is None:
        return table_step(item.source, candidates(scope, item.source, tests, known), runs)
    return rows_step(item.source, _hashed(scope, item, tests, known), runs)


# Reading FROM


def from_items(scope: Scope, node: exp.Expr) -> list[Item]:
    """FROM with its joins, in order; the sources are added to the scope."""
    items = []
    if (first := node.args.get("from_")) is not None:
        only(first, "this")
        items.append(_item(scope, first.this))
    for join in node.args.get("joins") or []:
        items.append(_join(scope, join))
    return items


def _join(scope: Scope, join: exp.Join) -> Item:
    only(join, "this", "side", "kind", "on")
    side, kind = parse.name(join.args.get("side")), parse.name(join.args.get("kind"))
    if side not in ("", "left") or kind not in ("", "inner", "outer", "cross"):
        raise refuse(join)
    item = _item(scope, join.this)
    item.outer, item.on = side == "left", conjuncts(join.args.get("on"))
    return item


def _item(scope: Scope, node: exp.Expr) -> Item:
    if node.args.get("joins"):
        raise refuse(node)
    if isinstance(node, exp.Unnest):
        return _unnest(scope, node)
    if isinstance(node, exp.Subquery):
        only(node, "this", "alias")
        with scope.unit.recording() as seen:
            query = scope.unit.query(node.this, scope.unit, scope.parent)
        return _rows_item(scope, query, parse.name(node.args["alias"]), kept=not seen)
    if not isinstance(node, exp.Table):
        raise refuse(node)
    only(node, "this", "alias", "db")
    if isinstance(node.this, exp.Anonymous):
        return _function(scope, node)
    name = parse.name(node.this)
    alias = parse.name(node.args.get("alias")) or name
    if name in scope.unit.ctes and not node.args.get("db"):
        return _rows_item(scope, scope.unit.ctes[name], alias, kept=True)
    if name in scope.unit.views:
        query = scope.unit.query(scope.unit.views[name], scope.unit, None)
        return _rows_item(scope, query, alias, kept=False)
    return Item(scope.add(table_source(scope.unit, scope.unit.table(node), alias)))


def _rows_item(scope: Scope, query: Query, alias: str, *, kept: bool) -> Item:
    source = scope.add(Source(alias, scope.unit.slot(), query.columns))
    return Item(source, query.run, kept=kept)


def _unnest(scope: Scope, node: exp.Unnest) -> Item:
    only(node, "expressions", "alias", "offset")
    arrays = [expression(scope, each) for each in node.expressions]
    for array in arrays:
        if not array.kind.endswith("[]"):
            raise postgres(
                asyncpg.UndefinedFunctionError, f"function unnest({types.spoken(array.kind)}) does not exist"
            )
    alias = node.args["alias"]
    names = [parse.name(each) for each in alias.args.get("columns") or []]
    kinds = [array.kind[:-2] for array in arrays]
    if node.args.get("offset"):
        names.append(parse.name(node.args["offset"]))
        kinds.append("int8")
    if len(names) != len(kinds):
        raise refuse(node)
    columns = tuple(zip(names, kinds, strict=True))
    source = scope.add(Source(parse.name(alias.this), scope.unit.slot(), columns))
    numbered = bool(node.args.get("offset"))

    def rows(f: Frame) -> Iterable[tuple[Any, ...]]:
        found = itertools.zip_longest(*(array.run(f) or () for array in arrays))
        return ((*values, n) for n, values in enumerate(found, 1)) if numbered else found

    return Item(source, rows)


def _function(scope: Scope, node: exp.Table) -> Item:
    call = node.this
    name = parse.name(call.this)
    if name not in ("json_array_elements", "jsonb_array_elements"):
        raise Unsupported(f"the function {name} in FROM")
    (argument,) = call.expressions
    kind = name.split("_")[0]
    made = expression(scope, argument, kind)
    if made.kind != kind:
        raise refuse(node)
    alias = node.args.get("alias")
    columns = (((parse.name((alias.args.get("columns") or [None])[0]) if alias else "") or "value", kind),)
    source = scope.add(Source(parse.name(alias) or name, scope.unit.slot(), columns, scalar=True))
    return Item(source, lambda f: [(each,) for each in json_elements(made.run(f) or "[]")])
