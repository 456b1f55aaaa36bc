"""The schema: what CREATE and ALTER make of tables, constraints, indexes, views and triggers."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import types
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.expressions import condition, expression
from sim.postgres.parse import Teller, name, only
from sim.postgres.plan import constant
from sim.postgres.scope import Frame, Run, Scope, Source, Unit, refuse
from sim.postgres.select import query
from sim.postgres.tables import (
    Check,
    Column,
    Exclusion,
    Index,
    Predicate,
    Reference,
    Row,
    Table,
    Trigger,
    Values,
)
from sim.postgres.transactions import Transaction


@dataclass(slots=True)
class Schema:
    """What one owner has. `version` counts its changes: plans belong to one version."""

    name: str
    tables: dict[str, Table] = field(default_factory=dict)
    views: dict[str, exp.Expr] = field(default_factory=dict)
    tellers: dict[str, Teller] = field(default_factory=dict)
    version: int = 0

    def define(self, node: exp.Expr | Teller, tx: Transaction) -> str | None:
        """Carry out a statement that changes the schema and give its tag; None when it is none."""
        if isinstance(node, Teller):
            self.tellers[node.name] = node
            tx.on_rollback.append(partial(self.tellers.pop, node.name, None))
            return "CREATE FUNCTION"
        if isinstance(node, exp.Alter):
            self._alter(node, tx)
            return "ALTER TABLE"
        if not isinstance(node, exp.Create):
            return None
        kind = str(node.args["kind"]).upper()
        makers = {"TABLE": self._table, "INDEX": self._index, "VIEW": self._view, "TRIGGER": self._trigger}
        if kind not in makers:
            raise refuse(node)
        if kind == "TABLE" and node.args.get("exists") and self._has(node):
            return "CREATE TABLE"
        makers[kind](node, tx)
        self.version += 1
        return f"CREATE {kind}"

    # Tables

    def _has(self, node: exp.Create) -> bool:
        return isinstance(node.this, exp.Schema) and name(node.this.this) in self.tables

    def _table(self, node: exp.Create, tx: Transaction) -> None:
        only(node, "this", "kind", "exists")
        if not isinstance(node.this, exp.Schema):
            raise refuse(node)
        called = name(node.this.this)
        if called in self.tables:
            raise postgres(asyncpg.DuplicateTableError, f'relation "{called}" already exists')
        parts = node.this.expressions
        columns = [each for each in parts if isinstance(each, exp.ColumnDef)]
        table = Table(called, tuple(_column(each) for each in columns))
        table.defaults = [_default(each, self.tables) for each in columns]
        self.tables[called] = table
        try:
            for each in columns:
                for constraint in each.args.get("constraints") or []:
                    self._column_constraint(table, name(each.this), constraint.kind)
            for each in parts:
                if not isinstance(each, exp.ColumnDef):
                    self._constraint(table, each)
        except BaseException:  # whatever is wrong with it, no half of a table stays
            self._drop(table)
            raise
        tx.on_rollback.append(lambda: self._drop(table))

    def _drop(self, table: Table) -> None:
        del self.tables[table.name]
        for reference in table.references:
            if reference in reference.parent.referenced_by:
                reference.parent.referenced_by.remove(reference)
        self.version += 1

    def _column_constraint(self, table: Table, column: str, kind: exp.Expr) -> None:
        if isinstance(kind, exp.PrimaryKeyColumnConstraint):
            self._primary(table, [column], f"{table.name}_pkey")
        elif isinstance(kind, exp.UniqueColumnConstraint):
            _unique(table, [column], f"{table.name}_{column}_key")
        elif isinstance(kind, exp.CheckColumnConstraint):
            table.checks.append(Check(f"{table.name}_{column}_check", predicate(table, kind.this)))
        elif isinstance(kind, exp.Reference):
            self._reference(table, [column], kind, f"{table.name}_{column}_fkey")
        elif not isinstance(
            kind,
            exp.NotNullColumnConstraint
            | exp.DefaultColumnConstraint
            | exp.GeneratedAsIdentityColumnConstraint,
        ):
            raise refuse(kind)

    def _constraint(self, table: Table, node: exp.Expr) -> None:
        if isinstance(node, exp.PrimaryKey):
            self._primary(table, [name(_plain(each)) for each in node.expressions], f"{table.name}_pkey")
            return
        if not isinstance(node, exp.Constraint):
            raise refuse(node)
        called = name(node.this)
        for each in node.expressions:
            if isinstance(each, exp.UniqueColumnConstraint):
                _unique(table, [name(_plain(c)) for c in each.this.expressions], called)
            elif isinstance(each, exp.PrimaryKey):
                self._primary(table, [name(_plain(c)) for c in each.expressions], called)
            elif isinstance(each, exp.ForeignKey):
                only(each, "expressions", "reference")
                self._reference(table, [name(c) for c in each.expressions], each.args["reference"], called)
            elif isinstance(each, exp.CheckColumnConstraint):
                table.checks.append(Check(called, predicate(table, each.this)))
            elif isinstance(each, exp.ExcludeColumnConstraint):
                table.exclusions.append(_exclusion(table, called, each.this))
            else:
                raise refuse(each)

    def _primary(self, table: Table, columns: list[str], called: str) -> None:
        table.primary = tuple(table.position(each) for each in columns)
        table.columns = tuple(
            replace(column, required=column.required or at in table.primary)
            for at, column in enumerate(table.columns)
        )
        _unique(table, columns, called)

    def _reference(self, table: Table, columns: list[str], node: exp.Expr, called: str) -> None:
        only(node, "this")
        parent = self.tables.get(name(node.this.this))
        if parent is None:
            raise postgres(asyncpg.UndefinedTableError, f'relation "{name(node.this.this)}" does not exist')
        named = [name(each) for each in node.this.expressions]
        reference = Reference(
            called,
            table,
            tuple(table.position(each) for each in columns),
            parent,
            tuple(parent.position(each) for each in named) if named else parent.primary,
        )
        table.references.append(reference)
        parent.referenced_by.append(reference)
        table.lookup(reference.columns)

    def _alter(self, node: exp.Alter, tx: Transaction) -> None:
        only(node, "this", "kind", "actions")
        table = self.tables.get(name(node.this.this))
        if table is None:
            raise postgres(asyncpg.UndefinedTableError, f'relation "{name(node.this.this)}" does not exist')
        if any(row.writer is not None for row in table.rows):
            raise Unsupported("ALTER TABLE while rows of it are being written")
        for action in node.args["actions"]:
            if isinstance(action, exp.AddConstraint):
                if table.rows:
                    raise Unsupported("a new constraint on a table that has rows")
                for each in action.expressions:
                    self._constraint(table, each)
            elif isinstance(action, exp.ColumnDef):
                self._add_column(table, action, tx)
            else:
                raise refuse(action)
        self.version += 1

    def _add_column(self, table: Table, node: exp.ColumnDef, tx: Transaction) -> None:
        before = (table.columns, table.defaults, {row: row.data for row in table.rows})
        column, default = _column(node), _default(node, self.tables)
        value = default([(), None]) if default is not None else None
        if value is None and column.required and table.rows:
            raise postgres(
                asyncpg.NotNullViolationError,
                f'column "{column.name}" of relation "{table.name}" contains null values',
            )
        table.columns, table.defaults = (*table.columns, column), [*table.defaults, default]
        for row in table.rows:
            row.data = None if row.data is None else (*row.data, value)
        for constraint in node.args.get("constraints") or []:
            self._column_constraint(table, column.name, constraint.kind)

        def take_back() -> None:
            table.columns, table.defaults, rows = before
            for row, data in rows.items():
                row.data = data
            self.version += 1

        tx.on_rollback.append(take_back)

    # The rest

    def _index(self, node: exp.Create, tx: Transaction) -> None:
        only(node, "this", "kind", "unique")
        index = node.this
        table = self.tables[name(index.args["table"].this)]
        params = index.args["params"]
        only(params, "columns", "where", "using")
        columns = [_plain(each) for each in params.args["columns"]]
        where = params.args.get("where")
        if node.args.get("unique"):
            made = _unique(
                table, [name(each) for each in columns], name(index.this), where.this if where else None
            )
            tx.on_rollback.append(lambda: table.indexes.remove(made))
        elif all(isinstance(each, exp.Column | exp.Identifier) for each in columns):
            table.lookup((table.position(name(columns[0])),))
        # An index over expressions only makes PostgreSQL faster.

    def _view(self, node: exp.Create, tx: Transaction) -> None:
        only(node, "this", "kind", "expression")
        called = name(node.this)
        query(node.args["expression"], Unit(self.tables, self.views, query), None)
        self.views[called] = node.args["expression"]
        tx.on_rollback.append(partial(self.views.pop, called, None))

    def _trigger(self, node: exp.Create, tx: Transaction) -> None:
        only(node, "this", "kind", "properties")
        (properties,) = node.args["properties"].expressions
        only(properties, "table", "timing", "events", "execute", "for_each", "when")
        if (
            str(properties.args["timing"]).upper() != "AFTER"
            or str(properties.args["for_each"]).upper() != "ROW"
        ):
            raise refuse(node)
        table = self.tables[name(properties.args["table"])]
        teller = self.tellers[name(properties.args["execute"].this.this)]
        events = frozenset(str(each.this).lower() for each in properties.args["events"])
        trigger = _teller(table, teller, name(node.this), events, properties.args.get("when"))
        table.triggers.append(trigger)
        tx.on_rollback.append(lambda: table.triggers.remove(trigger))


def _plain(node: exp.Expr) -> Any:
    return node.this if isinstance(node, exp.Ordered) else node


def _column(node: exp.ColumnDef) -> Column:
    only(node, "this", "kind", "constraints")
    kinds = [each.kind for each in node.args.get("constraints") or []]
    identity = any(isinstance(kind, exp.GeneratedAsIdentityColumnConstraint) for kind in kinds)
    required = identity or any(
        isinstance(kind, exp.NotNullColumnConstraint) and not kind.args.get("allow_null") for kind in kinds
    )
    return Column(name(node.this), types.declared(node.args["kind"]), required, identity)


def _default(node: exp.ColumnDef, tables: dict[str, Table]) -> Run | None:
    for constraint in node.args.get("constraints") or []:
        if isinstance(constraint.kind, exp.DefaultColumnConstraint):
            return constant(constraint.kind.this, types.declared(node.args["kind"]), tables)
    return None


def _unique(table: Table, columns: list[str], called: str, where: exp.Expr | None = None) -> Index:
    test = None if where is None else predicate(table, where)
    index = Index(called, tuple(table.position(each) for each in columns), unique=True, where=test)
    committed = [
        row.data for row in table.rows if row.data is not None and (test is None or test(row.data) is True)
    ]
    keys = [index.key(values) for values in committed if not index.has_null(values)]
    if len(set(keys)) < len(keys):
        raise postgres(
            asyncpg.UniqueViolationError, f'could not create unique index "{called}"', constraint_name=called
        )
    return table.add_index(index)


def _over(table: Table, *aliases: str) -> tuple[Scope, Callable[..., Frame]]:
    """A scope in which names are a row's columns, and how a frame is made of rows."""
    unit = Unit({}, {}, query)
    scope = Scope(unit)
    columns = tuple((c.name, c.kind) for c in table.columns)
    for alias in aliases:
        scope.add(Source(alias, unit.slot(), columns))
    return scope, lambda *rows: [(), None, *rows]


def predicate(table: Table, node: exp.Expr) -> Predicate:
    scope, frame = _over(table, table.name)
    run = condition(scope, node)
    return lambda values: run(frame(values))


def _exclusion(table: Table, called: str, node: exp.Expr) -> Exclusion:
    """The one kind that there is: `exclude using gist ((column::inet) inet_ops with &&)`."""
    only(node, "using", "columns", "where")
    (column,) = node.args["columns"]
    value = column.this.this
    if isinstance(value, exp.Opclass):
        value = value.this
    if name(column.args["op"]) != "&&":
        raise refuse(node)
    scope, frame = _over(table, table.name)
    made = expression(scope, value)
    if made.kind != "inet":
        raise refuse(node)
    where = node.args.get("where")
    test: Predicate = predicate(table, where.this) if where is not None else lambda values: True
    return Exclusion(called, lambda values: made.run(frame(values)), test, _networks_overlap)


def _networks_overlap(one: str, other: str) -> bool:
    a, b = ipaddress.ip_interface(one).network, ipaddress.ip_interface(other).network
    return a.version == b.version and a.overlaps(b)


def _teller(
    table: Table, teller: Teller, called: str, events: frozenset[str], when: exp.Expr | None
) -> Trigger:
    scope, frame = _over(table, "old", "new")

    def named(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Column) and name(node.this) == "tg_table_name":
            return exp.Literal.string(table.name)
        return node

    channel = expression(scope, teller.channel, "text").run
    payload = expression(scope, teller.payload.transform(named), "text").run
    test = condition(scope, when) if when else None

    def tell(old: Values, new: Values) -> tuple[str, str]:
        f = frame(old, new)
        return channel(f), payload(f)

    chosen = None if test is None else lambda old, new: test(frame(old, new))
    return Trigger(called, events, chosen, tell)


__all__ = ["Row", "Schema", "predicate"]
