"""What the command prints: tables for people, JSON and YAML for programs, sentences for problems."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, NoReturn

import msgspec
import yaml
from rich.console import Console
from rich.table import Table

from volery.client.transport import ProblemError

STATES = {
    "up": "green",
    "active": "green",
    "ok": "green",
    "succeeded": "green",
    "down": "dim",
    "failed": "red",
    "non_responsive": "red",
    "non_operational": "red",
    "illegal": "red",
    "unknown": "yellow",
    "maintenance": "yellow",
}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def plain(value: Any) -> Any:
    """Built-in types only, as JSON has them."""
    return msgspec.json.decode(msgspec.json.encode(value))


def show(value: Any, form: Format, columns: Sequence[str] = ()) -> None:
    """One object or many."""
    if form is Format.JSON:
        sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")
    elif form is Format.YAML:
        sys.stdout.write(yaml.safe_dump(plain(value), sort_keys=False))
    elif isinstance(value, list):
        _table(value, columns)
    else:
        _details(plain(value))


def _table(items: Iterable[Any], columns: Sequence[str]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix("_bytes").replace("_", " ").upper(), overflow="fold")
    for item in items:
        fields = plain(item)
        table.add_row(*(cell(column, fields.get(column)) for column in columns))
    out.print(table)


def _details(fields: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value not in ("", None, [], {}):
            table.add_row(name.removesuffix("_bytes").replace("_", " "), cell(name, value))
    out.print(table)


def cell(name: str, value: Any) -> str:
    """A value as a person reads it."""
    if name == "guest" and isinstance(value, dict):
        return " ".join([value.get("hostname", ""), *value.get("ip_addresses", [])]).strip() or "-"
    if name == "problems" and isinstance(value, list):
        return "\n".join(f"{item['message']} (since {cell('since_at', item['since'])})" for item in value)
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    if name in ("status", "state") and isinstance(value, str) and value in STATES:
        return f"[{STATES[value]}]{value}[/]"
    if name.endswith("_at") and isinstance(value, str):
        return value[:19].replace("T", " ")
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) if _flat(value) else json.dumps(value)
    return "-" if value in ("", None) else str(value)


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)


def size(count: int) -> str:
    """1536 → 1.5 KiB"""
    amount = float(count)
    for unit in UNITS[:-1]:
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if amount == int(amount) else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} {UNITS[-1]}"


def read_size(text: str) -> int:
    """`2GiB`, `512M`, `1048576` → bytes. Raises ValueError."""
    cleaned = text.strip().upper().replace(" ", "").removesuffix("IB").removesuffix("B")
    factor = 1
    for power, letter in enumerate("KMGTP", start=1):
        if cleaned.endswith(letter):
            factor, cleaned = 1024**power, cleaned[:-1]
    return int(float(cleaned) * factor)


def problem(error: ProblemError) -> None:
    """The sentence, and the fields that say where."""
    err.print(f"[red]error:[/] {error}")
    for item in error.problem.get("errors", []):
        err.print(f"  {item.get('pointer', '')}: {item.get('detail', '')}")
    if trace := error.problem.get("trace_id"):
        err.print(f"  trace {trace}", style="dim")


def fail(message: str, code: int = 1) -> NoReturn:
    err.print(f"[red]error:[/] {message}")
    raise SystemExit(code)
