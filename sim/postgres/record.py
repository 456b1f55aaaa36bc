"""Rows as asyncpg answers with them: values by number and by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class Record(tuple[Any, ...]):
    """What the product uses of asyncpg.Record, which can't be made from outside."""

    __slots__ = ()
    columns: ClassVar[dict[str, int]] = {}
    names: ClassVar[tuple[str, ...]] = ()
    """Of all columns; two may have one name."""
    arrays: ClassVar[tuple[int, ...]] = ()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return tuple.__getitem__(self, self.columns[key])
        return tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.columns

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.columns else default

    def keys(self) -> Iterator[str]:
        return iter(self.names)

    def values(self) -> Iterator[Any]:
        return iter(self)

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self, strict=True)

    def __repr__(self) -> str:
        return "<Record " + " ".join(f"{name}={value!r}" for name, value in self.items()) + ">"


def record_type(columns: tuple[tuple[str, str], ...]) -> type[Record]:
    """The kind of record that a plan gives. Of two columns with one name the last is found by it."""
    return type(
        "Record",
        (Record,),
        {
            "__slots__": (),
            "columns": {name: at for at, (name, _) in enumerate(columns)},
            "names": tuple(name for name, _ in columns),
            "arrays": tuple(at for at, (_, kind) in enumerate(columns) if kind.endswith("[]")),
        },
    )


def records(kind: type[Record], rows: list[tuple[Any, ...]]) -> list[Record]:
    if not kind.arrays:
        return [kind(row) for row in rows]
    return [kind([list(v) if isinstance(v, list) else v for v in row]) for row in rows]
