"""What names mean where: the sources of a query, and what one statement's compilation shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import asyncpg
from sqlglot import exp

from sim.postgres import parse
from sim.postgres.errors import Unsupported, postgres
from sim.postgres.tables import Table

Frame = list[Any]
"""[arguments, Command, …]: then one slot for each source of the statement, holding its current row's values."""
ARGUMENTS, COMMAND, FIRST_SLOT = 0, 1, 2
Run = Callable[[Frame], Any]


class Compiled(NamedTuple):
    """An expression: what computes it, and its type."""

    run: Run
    kind: str


class Query(NamedTuple):
    """A query: what gives its rows, and their columns with types. `status` counts for the command's tag."""

    run: Callable[[Frame], list[tuple[Any, ...]]]
    columns: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Source:
    """Something in FROM: a table, or the columns of a query or function."""

    alias: str
    slot: int
    columns: tuple[tuple[str, str], ...]
    table: Table | None = None
    scalar: bool = False
    """A function with one result, which its alias names too."""

    def position(self, column: str) -> int | None:
        for at, (known, _) in enumerate(self.columns):
            if known == column:
                return at
        return None


@dataclass(slots=True)
class Grouping:
    """While a query's rows are groups: which columns are the same in all of one, and the aggregates found so far."""

    slot: int
    columns: set[tuple[int, int]]
    whole: set[int]
    """Slots that are grouped by their primary key."""
    aggregates: list[Any] = field(default_factory=list)


class CompileQuery(Protocol):
    def __call__(self, node: exp.Expr, unit: Unit, parent: Scope | None) -> Query: ...


@dataclass(slots=True)
class Unit:
    """The compilation of one statement."""

    tables: dict[str, Table]
    views: dict[str, exp.Expr]
    query: CompileQuery
    slots: int = FIRST_SLOT
    arguments: dict[int, str] = field(default_factory=dict)
    """Number → type, once it is known."""
    ctes: dict[str, Query] = field(default_factory=dict)
    memos: int = 0
    used: dict[Table, None] = field(default_factory=dict)
    """The tables that it reads or writes."""
    steady: bool = True
    """What it answers depends on nothing but its arguments and what is committed in its tables, if it writes nothing."""
    _recording: list[set[int]] = field(default_factory=list)

    def slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def memo(self) -> int:
        self.memos += 1
        return self.memos

    @contextmanager
    def recording(self) -> Iterator[set[int]]:
        """The slots that what is compiled inside reads; -1 for what differs each time."""
        seen: set[int] = set()
        self._recording.append(seen)
        try:
            yield seen
        finally:
            self._recording.pop()
            for outer in self._recording[-1:]:
                outer |= seen

    def reads(self, slot: int) -> None:
        if slot < 0:
            self.steady = False
        if self._recording:
            self._recording[-1].add(slot)

    def table(self, node: exp.Table) -> Table:
        parse.only(node, "this", "alias")
        found = self.tables.get(parse.name(node.this))
        if found is None:
            raise postgres(asyncpg.UndefinedTableError, f'relation "{parse.name(node.this)}" does not exist')
        self.used[found] = None
        return found


@dataclass(slots=True)
class Scope:
    """The sources that a name may mean, those of the query around it last."""

    unit: Unit
    parent: Scope | None = None
    sources: list[Source] = field(default_factory=list)
    grouping: Grouping | None = None
    windows: tuple[int, list[Any]] | None = None
    """Slot and the window functions found so far, where they are allowed."""

    def find(self, source: str, column: str) -> tuple[Source, int] | None:
        """Where a column is. Raises AmbiguousColumnError."""
        hits: list[tuple[Source, int]] = []
        for each in self.sources:
            if source and source != each.alias:
                continue
            at = each.position(column)
            if at is not None:
                hits.append((each, at))
        if len(hits) > 1:
            raise postgres(asyncpg.AmbiguousColumnError, f'column reference "{column}" is ambiguous')
        if not hits and not source:
            hits = [(each, 0) for each in self.sources if each.scalar and each.alias == column]
        if hits:
            return hits[0]
        return None if self.parent is None else self.parent.find(source, column)

    def column(self, node: exp.Column) -> Compiled:
        parse.only(node, "this", "table")
        source, column = parse.name(node.args.get("table")), parse.name(node.this)
        found = self.find(source, column)
        if found is None:
            whole = f"{source}.{column}" if source else f'"{column}"'
            raise postgres(asyncpg.UndefinedColumnError, f"column {whole} does not exist")
        where, at = found
        self._in_group(where, at, column)
        slot, kind = where.slot, where.columns[at][1]
        self.unit.reads(slot)
        return Compiled(lambda f: f[slot][at], kind)

    def _in_group(self, source: Source, at: int, column: str) -> None:
        group = self.grouping
        if group is None or source not in self.sources:
            return
        if source.slot not in group.whole and (source.slot, at) not in group.columns:
            raise postgres(
                asyncpg.GroupingError,
                f'column "{source.alias}.{column}" must appear in the GROUP BY clause or be used in an aggregate function',
            )

    def add(self, source: Source) -> Source:
        if any(source.alias == each.alias for each in self.sources):
            raise postgres(
                asyncpg.DuplicateAliasError, f'table name "{source.alias}" specified more than once'
            )
        self.sources.append(source)
        return source


def table_source(unit: Unit, table: Table, alias: str) -> Source:
    """Its slot holds the values, the slot behind it the row itself."""
    slot = unit.slot()
    unit.slot()
    return Source(alias, slot, tuple((c.name, c.kind) for c in table.columns), table)


def refuse(node: exp.Expr) -> Unsupported:
    return Unsupported(f"{type(node).__name__}: {node.sql(dialect='postgres')}")
