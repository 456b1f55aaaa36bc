"""Functions of many rows: aggregates over groups, and windows over all rows of a query."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import types
from sim.postgres.errors import Unsupported, postgres, undefined
from sim.postgres.expressions import compiles, condition, expression
from sim.postgres.parse import only
from sim.postgres.scope import Compiled, Frame, Run, Scope, refuse

Fold = Callable[[list[Any]], Any]
"""From the values that aren't NULL."""
SortKey = tuple[Run, bool]
"""What rows are ordered by, and whether descending."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    value: Run
    """True for count(*)."""
    fold: Fold
    only_if: Run | None = None

    def over(self, values: list[Any]) -> Any:
        return self.fold([value for value in values if value is not None])

    def take(self, f: Frame) -> Any:
        """What one row adds; None for nothing."""
        if self.only_if is not None and self.only_if(f) is not True:
            return None
        return self.value(f)


@dataclass(frozen=True, slots=True)
class WindowCall:
    """An aggregate of all rows up to the current one and its peers; None is row_number()."""

    aggregate: Aggregate | None
    order: list[SortKey]
    partition: list[Run]

    def over(self, rows: list[Frame]) -> list[Any]:
        """The function's value for each row. `rows` are frames."""
        results: list[Any] = [None] * len(rows)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(tuple(run(row) for run in self.partition), []).append(number)
        for members in groups.values():
            self._group(rows, members, results)
        return results

    def _group(self, rows: list[Frame], members: list[int], results: list[Any]) -> None:
        keys = {number: [run(rows[number]) for run, _ in self.order] for number in members}
        sort_by(members, keys.__getitem__, [down for _, down in self.order])
        if self.aggregate is None:
            for place, number in enumerate(members, 1):
                results[number] = place
            return
        total: Any = None
        for _, same in itertools.groupby(members, keys.__getitem__):
            peers = list(same)
            total = self.aggregate.over([total, *(self.aggregate.take(rows[n]) for n in peers)])
            for number in peers:
                results[number] = total


def sort_by(items: list[Any], keys: Callable[[Any], Sequence[Any]], descending: list[bool]) -> None:
    """In place, by each of an item's keys; NULL is larger than everything, as PostgreSQL's default has it."""
    for at in reversed(range(len(descending))):
        items.sort(key=partial(_rank, keys, at), reverse=descending[at])


def _rank(keys: Callable[[Any], Sequence[Any]], at: int, item: Any) -> tuple[bool, Any]:
    value = keys(item)[at]
    return value is None, value


def order_keys(scope: Scope, order: exp.Order | None) -> list[SortKey]:
    found = []
    for item in order.expressions if order is not None else []:
        found.append((expression(scope, item.this).run, descends(item)))
    return found


def descends(item: exp.Ordered) -> bool:
    """Whether descending. Raises Unsupported for NULLs in an unusual place."""
    only(item, "this", "desc", "nulls_first")
    down = bool(item.args.get("desc"))
    if bool(item.args.get("nulls_first")) != down:
        raise Unsupported("NULLS FIRST or LAST")
    return down


def _sum(kind: str) -> tuple[Fold, str]:
    if kind in ("int2", "int4"):
        return lambda values: types.in_range("int8", sum(values)) if values else None, "int8"
    if kind in ("int8", "numeric"):
        return lambda values: sum(map(Decimal, values), Decimal(0)) if values else None, "numeric"
    if kind == "float8":
        return lambda values: sum(values) if values else None, "float8"
    raise undefined(f"function sum({types.spoken(kind)}) does not exist")


def _extreme(best: Callable[[list[Any]], Any]) -> Callable[[str], tuple[Fold, str]]:
    def of(kind: str) -> tuple[Fold, str]:
        if kind not in (*types.NUMBERS, "text", "timestamptz", "interval"):
            raise undefined(f"function max({types.spoken(kind)}) does not exist")
        return lambda values: best(values) if values else None, kind

    return of


def _boolean(test: Callable[[list[bool]], bool]) -> Callable[[str], tuple[Fold, str]]:
    return lambda kind: (lambda values: test(values) if values else None, "bool")


_FOLDS: dict[type[exp.Expr], Callable[[str], tuple[Fold, str]]] = {
    exp.Count: lambda kind: (len, "int8"),
    exp.Sum: _sum,
    exp.Max: _extreme(max),
    exp.Min: _extreme(min),
    exp.LogicalOr: _boolean(any),
    exp.LogicalAnd: _boolean(all),
}


def aggregates(node: exp.Expr) -> bool:
    """Whether an expression has an aggregate of its own query."""
    if isinstance(node, exp.Window | exp.Query):
        return False
    if type(node) in _FOLDS:
        return True
    return any(aggregates(child) for child in node.iter_expressions())


def _aggregate(scope: Scope, node: exp.Expr, only_if: Run | None = None) -> tuple[Aggregate, str]:
    only(node, "this", "big_int", "expressions")
    if node.args.get("expressions"):
        raise refuse(node)
    if isinstance(node.this, exp.Star):
        return Aggregate(lambda f: True, len, only_if), "int8"
    if isinstance(node.this, exp.Distinct):
        (value,) = node.this.expressions
        only(node.this, "expressions")
        made = expression(scope, value)
        once, kind = _FOLDS[type(node)](made.kind)
        return Aggregate(made.run, lambda values: once(list(dict.fromkeys(values))), only_if), kind
    made = expression(scope, node.this)
    fold, kind = _FOLDS[type(node)](made.kind)
    return Aggregate(made.run, fold, only_if), kind


@compiles(*_FOLDS)
def _grouped(scope: Scope, node: exp.Expr, want: str) -> Compiled:
    return _in_group(scope, node, None)


@compiles(exp.Filter)
def _filtered(scope: Scope, node: exp.Filter, want: str) -> Compiled:
    only(node, "this", "expression")
    return _in_group(scope, node.this, node.expression.this)


def _in_group(scope: Scope, node: exp.Expr, filtered: exp.Expr | None) -> Compiled:
    group = scope.grouping
    if group is None or type(node) not in _FOLDS:
        raise postgres(asyncpg.GroupingError, "aggregate functions are not allowed here")
    scope.grouping = None  # inside, single rows are meant
    try:
        only_if = None if filtered is None else condition(scope, filtered)
        made, kind = _aggregate(scope, node, only_if)
    finally:
        scope.grouping = group
    group.aggregates.append(made)
    slot, at = group.slot, len(group.aggregates) - 1
    scope.unit.reads(slot)
    return Compiled(lambda f: f[slot][at], kind)


@compiles(exp.Window)
def _window(scope: Scope, node: exp.Window, want: str) -> Compiled:
    only(node, "this", "order", "over", "partition_by")
    if scope.windows is None:
        raise postgres(asyncpg.WindowingError, "window functions are not allowed here")
    (slot, calls), scope.windows = scope.windows, None
    try:
        order = order_keys(scope, node.args.get("order"))
        partition = [expression(scope, each).run for each in node.args.get("partition_by") or []]
        if isinstance(node.this, exp.RowNumber):
            call, kind = WindowCall(None, order, partition), "int8"
        elif type(node.this) in _FOLDS and not isinstance(node.this, exp.Count):
            aggregate, kind = _aggregate(scope, node.this)
            call = WindowCall(aggregate, order, partition)
        else:
            raise refuse(node)
    finally:
        scope.windows = (slot, calls)
    calls.append(call)
    at = len(calls) - 1
    scope.unit.reads(slot)
    return Compiled(lambda f: f[slot][at], kind)
