"""What every write of a row keeps: constraints, foreign keys, triggers."""

from __future__ import annotations

from typing import Any

import asyncpg

from sim.postgres.errors import Blocked, postgres
from sim.postgres.tables import Index, Reference, Row, Table, Values
from sim.postgres.transactions import Command


def check_row(table: Table, values: Values) -> None:
    """Raises NotNullViolationError, CheckViolationError."""
    for value, column in zip(values, table.columns, strict=True):
        if value is None and column.required:
            raise postgres(
                asyncpg.NotNullViolationError,
                f'null value in column "{column.name}" of relation "{table.name}" violates not-null constraint',
                table_name=table.name,
                column_name=column.name,
            )
    for check in table.checks:
        if check.holds(values) is False:
            raise postgres(
                asyncpg.CheckViolationError,
                f'new row for relation "{table.name}" violates check constraint "{check.name}"',
                table_name=table.name,
                constraint_name=check.name,
            )


def unique_violation(table: Table, index: Index) -> asyncpg.PostgresError:
    return postgres(
        asyncpg.UniqueViolationError,
        f'duplicate key value violates unique constraint "{index.name}"',
        table_name=table.name,
        constraint_name=index.name,
    )


def check_others(
    command: Command, table: Table, values: Values, itself: Row | None, old: Values | None
) -> None:
    """Raises UniqueViolationError, ExclusionViolationError, Blocked."""
    for index in table.constraints():
        unmoved = old is not None and index.where is None and index.key(old) == index.key(values)
        if not unmoved and command.conflicting(index, values, itself) is not None:
            raise unique_violation(table, index)
    for exclusion in table.exclusions:
        if exclusion.where(values) is not True:
            continue
        mine = exclusion.value(values)
        for row in table.rows:
            if row is itself:
                continue
            for theirs in {row.newest(command.tx), row.next if row.writer is not None else None} - {None}:
                assert theirs is not None
                if exclusion.where(theirs) is True and exclusion.overlaps(mine, exclusion.value(theirs)):
                    if row.writer is not None and row.writer is not command.tx:
                        raise Blocked(row.writer)
                    raise postgres(
                        asyncpg.ExclusionViolationError,
                        f'conflicting key value violates exclusion constraint "{exclusion.name}"',
                        table_name=table.name,
                        constraint_name=exclusion.name,
                    )


def insert(command: Command, table: Table, values: Values) -> Row:
    check_others(command, table, values, None, None)
    row = command.insert(table, values)
    _after(command, table, "insert", row, None, values)
    return row


def update(command: Command, row: Row, old: Values, new: Values) -> None:
    check_row(row.table, new)
    check_others(command, row.table, new, row, old)
    command.write(row, new)
    _after(command, row.table, "update", row, old, new)


def delete(command: Command, row: Row, old: Values) -> None:
    command.write(row, None)
    _after(command, row.table, "delete", row, old, None)


def _after(
    command: Command, table: Table, event: str, row: Row, old: Values | None, new: Values | None
) -> None:
    for reference in table.references:
        if new is not None and (old is None or reference.key(old) != reference.key(new)):
            command.checks.append(lambda r=reference: _child(command, r, row))  # type: ignore[misc]
    for reference in table.referenced_by:
        if old is not None and (new is None or _named(reference, old) != _named(reference, new)):
            command.checks.append(lambda r=reference: _parent(command, r, old))  # type: ignore[misc]
    nothing = (None,) * len(table.columns)
    for trigger in table.triggers:
        before, after = old or nothing, new or nothing
        if event in trigger.events and (trigger.when is None or trigger.when(before, after) is True):
            command.tx.told[trigger.tell(before, after)] = None


def _named(reference: Reference, values: Values) -> Values:
    return tuple(values[c] for c in reference.parent_columns)


def _child(command: Command, reference: Reference, row: Row) -> None:
    """What the row refers to exists, and stays until the transaction ends."""
    values = row.newest(command.tx)
    key = None if values is None else reference.key(values)
    if key is None:
        return
    index = reference.parent.lookup(reference.parent_columns)
    for parent in tuple(index.of(key if len(key) > 1 else key[0])):
        there = parent.newest(command.tx)
        if there is None or _named(reference, there) != key:
            continue
        if parent.writer is not None and parent.writer is not command.tx:
            ahead = parent.next
            if ahead is None or _named(reference, ahead) != key:
                raise Blocked(parent.writer)
        elif parent.writer is None:
            command.share(parent, all_of_it=False)
        return
    raise postgres(
        asyncpg.ForeignKeyViolationError,
        f'insert or update on table "{reference.child.name}" violates foreign key constraint "{reference.name}"',
        table_name=reference.child.name,
        constraint_name=reference.name,
    )


def _parent(command: Command, reference: Reference, old: Values) -> None:
    """Nothing refers any more to a row that is gone."""
    key = _named(reference, old)
    if any(
        _is_there(command, reference, each, key)
        for each in _rows(reference.parent, reference.parent_columns, key)
    ):
        return
    for row in _rows(reference.child, reference.columns, key):
        values = row.newest(command.tx)
        if values is not None and reference.key(values) == key:
            raise postgres(
                asyncpg.ForeignKeyViolationError,
                f'update or delete on table "{reference.parent.name}" violates foreign key constraint '
                f'"{reference.name}" on table "{reference.child.name}"',
                table_name=reference.child.name,
                constraint_name=reference.name,
            )


def _rows(table: Table, columns: tuple[int, ...], key: Values) -> tuple[Row, ...]:
    return tuple(table.lookup(columns).of(key if len(key) > 1 else key[0]))


def _is_there(command: Command, reference: Reference, row: Row, key: Any) -> bool:
    values = row.newest(command.tx)
    return values is not None and _named(reference, values) == key
