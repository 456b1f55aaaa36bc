"""A peer: FastAPI with pydantic answering a list of VMs from memory, nothing behind it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pydantic
from fastapi import FastAPI

from bench.peer import serve
from volery.contracts.vm import Vm


@cache
def model(struct: type[msgspec.Struct]) -> type[pydantic.BaseModel]:
    """The pydantic model with the fields of a message."""
    hints = get_type_hints(struct)
    fields: dict[str, Any] = {
        f.name: (_translated(hints[f.name]), ...) for f in msgspec.structs.fields(struct)
    }
    made: type[pydantic.BaseModel] = pydantic.create_model(struct.__name__, **fields)
    return made


def _translated(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return model(hint)
    arguments = get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple[_translated(arguments[0]), ...]  # type: ignore[misc]
    return hint


VM = model(Vm)
app = FastAPI()
held: list[Any] = []


@app.get("/vms", response_model=list[VM])  # type: ignore[valid-type]
async def vms() -> list[Any]:
    return held


if __name__ == "__main__":
    documents = msgspec.json.decode(Path(os.environ["BENCH_DOCUMENTS"]).read_bytes(), type=list[Vm])
    held = [VM.model_validate(msgspec.to_builtins(vm, builtin_types=())) for vm in documents]
    serve(app)
