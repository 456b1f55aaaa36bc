"""Every SQL statement that the product's modules contain, found in their source.

An f-string's parts are the module's own constants, or what `MEANS` says of them: a statement that is put together from
something else fails here until somebody says what it may be.
"""

from __future__ import annotations

import ast
import gc
import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from services.scheduler import adoption_store, store
from volery.runtime.tables import Table

OWNERS = ("inventory", "scheduler", "storage", "network", "ha")
MEANS: dict[tuple[str, str], tuple[str, ...]] = {
    ("services.network.store", "table"): ("data_center", "vm"),
    ("services.network.store", "key"): ("id",),
    ("services.storage.store", "table"): ("data_center", "host", "vm"),
    ("services.scheduler.store", "table"): ("host_capacity", "cluster", "network", "vm"),
    ("services.scheduler.store", "condition"): (
        "true",
        "id = $1",
        "id = any($1::text[])",
    ),
    ("services.scheduler.store", "lately"): ("", store.OF_RECENT_VMS),
    ("services.scheduler.adoption_store", "lately"): ("", adoption_store.OF_RECENT_VMS),
    ("services.scheduler.policy_store", "condition"): (
        "true",
        "id = $1",
        "id = (select policy_id from cluster where id = $1)",
    ),
    ("volery.runtime.hear_owners", "guard"): (
        "",
        "where heard.history = excluded.history and heard.position < excluded.position",
    ),
}
"""Also of what is a parameter of the function that asks."""
BUILT = {"volery.runtime.tables", "volery.runtime.pages"}
"""Modules that only put statements together; what comes out is asked for by other means."""
OPERATIONS = {"self.table"}
_BEGINS = re.compile(r"\s*(select|insert into|update|delete from|with)\s")
_SLOT = re.compile(r"\{(\d+)\}")


def statements() -> dict[str, set[str]]:
    """Owner → texts."""
    # Python 3.11 can't parse while it parses: a failed task that is collected meanwhile is logged, and its traceback's
    # lines are parsed.
    gc.collect()
    found: dict[str, set[str]] = {owner: set() for owner in OWNERS}
    for owner in OWNERS:
        for path in sorted(Path("services", owner).rglob("*.py")):
            if path.name != "__main__.py":
                found[owner] |= set(_of_module(_module(path)))
        for table in _tables(owner):
            found[owner] |= set(_of_table(table))
    for path in sorted(Path("volery/runtime").glob("*.py")):
        module = _module(path)
        if module.__name__ not in BUILT:
            found["ha"] |= set(_of_module(module))
    return found


def _module(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))


def _tables(owner: str) -> list[Table[Any, Any]]:
    stores = [importlib.import_module(f"services.{owner}.store")]
    if owner == "scheduler":
        stores += [
            importlib.import_module(f"services.scheduler.{name}") for name in ("policy_store", "plan_store")
        ]
    return [value for store in stores for value in vars(store).values() if isinstance(value, Table)]


def _of_table(table: Table[Any, Any]) -> Iterator[str]:
    """What tables.py makes for a noun."""
    yield f"select doc from {table.name} where id = $1"
    if table.name in ("capacity_of_host", "decision"):
        return  # a view; what is written by a statement of its own
    yield f"select doc, private from {table.name} where id = $1"
    for text in (table.sql.insert, table.sql.update, table.sql.update_both, table.sql.delete):
        yield _numbered(text)


def _numbered(text: str) -> str:
    numbered = _SLOT.sub(lambda slot: f"${int(slot[1]) + 1}", text)
    if "{prev}" in numbered:
        before = "select 1::bigint as seq, ''::text as id, true as takes"
        return f"with c0 as ({before}) {numbered.replace('{prev}', 'c0')}"
    return numbered


def _of_module(module: ModuleType) -> Iterator[str]:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
            yield from _condition(module, node)
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside:
            for text in _rendered(module, node):
                if _BEGINS.match(text):
                    yield _numbered(text)


def _condition(module: ModuleType, call: ast.Call) -> Iterator[str]:
    """Of `TABLE.where(pool, condition)`."""
    assert isinstance(call.func, ast.Attribute)
    source = ast.unparse(call.func.value)
    table = vars(module).get(source)
    if isinstance(table, Table):
        name = table.name
    elif source in OPERATIONS:
        name = "operation"
    else:
        return  # another library's `where`
    given = call.args[1] if len(call.args) > 1 else ast.Constant("true")
    if isinstance(given, ast.Name):
        given = ast.Constant(vars(module)[given.id])
    for condition in _rendered(module, given):
        yield f"select doc, private from {name} where {condition} order by id"


def _rendered(module: ModuleType, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    assert isinstance(node, ast.JoinedStr)
    parts: list[tuple[str, ...]] = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append((str(part.value),))
        else:
            assert isinstance(part, ast.FormattedValue)
            parts.append(_meant(module, ast.unparse(part.value)))
    texts = ["".join(chosen) for chosen in itertools.product(*parts)]
    for text in texts:
        if _BEGINS.match(text):
            assert "\0" not in text, f"{module.__name__}: say in MEANS what may stand in {text!r}"
    return texts


def _meant(module: ModuleType, source: str) -> tuple[str, ...]:
    known = vars(module).get(source)
    if isinstance(known, str):
        return (known,)
    return MEANS.get((module.__name__, source), (f"\0{source}\0",))
