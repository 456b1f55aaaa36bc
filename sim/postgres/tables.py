"""Tables in memory: rows with a committed version and at most one that its writer has not committed, and their indexes.

An index is a table from key to every row that has the key in any version; whoever looks something up in it reads the
version that it may see and compares again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.postgres.transactions import Transaction

Values = tuple[Any, ...]
Predicate = Callable[[Values], Any]


class Row:
    """One row. Compared and hashed by identity; dicts keep their order, so nothing depends on hashes."""

    __slots__ = ("command", "data", "next", "prior", "sharers", "table", "writer")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.data: Values | None = None
        """What is committed; None: nothing yet, or no more."""
        self.writer: Transaction | None = None
        """Who has it locked or written."""
        self.next: Values | None = None
        """What the writer made of it; None: deleted."""
        self.command = 0
        """The writer's newest statement that wrote it."""
        self.prior: Values | None = None
        """What the writer saw before that statement."""
        self.sharers: dict[Transaction, bool] | None = None
        """Who forbids writing it; False: only deleting it, or changing its key."""

    def newest(self, tx: Transaction) -> Values | None:
        """What the writer sees now, also of its running statement; for others what is committed."""
        return self.next if self.writer is tx else self.data


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    kind: str
    required: bool = False
    identity: bool = False


class Index:
    """Rows by the values of some columns; `unique` and `where` make it a constraint."""

    __slots__ = ("columns", "key", "name", "rows", "unique", "where")

    def __init__(self, name: str, columns: tuple[int, ...], *, unique: bool, where: Predicate | None = None):
        self.name = name
        self.columns = columns
        self.key: Callable[[Values], Any] = itemgetter(*columns)
        self.unique = unique
        self.where = where
        self.rows: dict[Any, dict[Row, None]] = {}

    def add(self, row: Row, values: Values) -> None:
        self.rows.setdefault(self.key(values), {})[row] = None

    def discard(self, row: Row, values: Values) -> None:
        key = self.key(values)
        bucket = self.rows.get(key)
        if bucket is not None:
            bucket.pop(row, None)
            if not bucket:
                del self.rows[key]

    def of(self, key: Any) -> Iterable[Row]:
        return self.rows.get(key, ())

    def has_null(self, values: Values) -> bool:
        return any(values[c] is None for c in self.columns)


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key."""

    name: str
    child: Table
    columns: tuple[int, ...]
    parent: Table
    parent_columns: tuple[int, ...]
    """Of the parent's primary key, or what it names."""

    def key(self, values: Values) -> Values | None:
        """The parent that this child names; None when it names none."""
        key = tuple(values[c] for c in self.columns)
        return None if None in key else key


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    holds: Predicate


@dataclass(frozen=True, slots=True)
class Exclusion:
    """No two rows that `where` chooses may have overlapping values."""

    name: str
    value: Callable[[Values], Any]
    where: Predicate
    overlaps: Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True)
class Trigger:
    """What is told of each written row: `tell` gives channel and payload from the old and the new values."""

    name: str
    events: frozenset[str]
    """insert, update, delete"""
    when: Callable[[Values, Values], Any] | None
    tell: Callable[[Values, Values], tuple[str, str]]


@dataclass(eq=False, slots=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    defaults: list[Any] = field(default_factory=list)
    """Per column a compiled expression or None."""
    primary: tuple[int, ...] = ()
    indexes: list[Index] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    exclusions: list[Exclusion] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    referenced_by: list[Reference] = field(default_factory=list)
    triggers: list[Trigger] = field(default_factory=list)
    rows: dict[Row, None] = field(default_factory=dict)
    counter: int = 0
    """Of the identity column; never given back."""
    version: int = 0
    """Counts the changes of what is committed."""

    def position(self, name: str) -> int:
        """Raises ValueError."""
        return [column.name for column in self.columns].index(name)

    def constraints(self) -> Iterator[Index]:
        return (index for index in self.indexes if index.unique)

    def lookup(self, columns: tuple[int, ...]) -> Index:
        """An index over all rows on exactly these columns, made when there is none."""
        for index in self.indexes:
            if index.columns == columns:
                return index
        return self.add_index(Index("", columns, unique=False))

    def indexed(self, column: int) -> bool:
        """Whether the schema has an index that begins with this column."""
        return any(index.columns[0] == column for index in self.indexes)

    def add_index(self, index: Index) -> Index:
        for row in self.rows:
            for values in (row.data, row.next, row.prior):
                if values is not None:
                    index.add(row, values)
        self.indexes.append(index)
        return index

    def note(self, row: Row, values: Values) -> None:
        """Make a version of a row findable."""
        for index in self.indexes:
            index.add(row, values)

    def settle(self, row: Row, versions: Sequence[Values]) -> None:
        """These versions of the row are found no more, unless one is committed or a later writer's."""
        final = row.data
        left = [final] if row.writer is None else [final, row.next, row.prior]
        for index in self.indexes:
            keep = [index.key(values) for values in left if values is not None]
            for values in versions:
                if index.key(values) not in keep:
                    index.discard(row, values)
        if final is None:
            self.rows.pop(row, None)

    def replace(self, contents: Iterable[Values], counter: int) -> None:
        """Forget everything and hold these committed rows."""
        self.version += 1
        self.rows.clear()
        for index in self.indexes:
            index.rows.clear()
        for values in contents:
            row = Row(self)
            row.data = values
            self.rows[row] = None
            self.note(row, values)
        self.counter = counter
