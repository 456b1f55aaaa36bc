"""What every command does around its request: connect, send, wait with a progress bar, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import httpx
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from volery.cli import output
from volery.cli.output import Format
from volery.client import session
from volery.client.request import Request, Resource
from volery.client.session import NoSession, Session
from volery.client.transport import Client, NotOne, OperationFailed, ProblemError
from volery.contracts.base import Entity
from volery.contracts.operation import ENDED, Operation, OperationState

A = TypeVar("A")
E = TypeVar("E", bound=Entity)

Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the operation has ended.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


@contextmanager
def connected() -> Iterator[Client]:
    """A client of the session; every problem becomes a sentence and an exit status."""
    try:
        known = session.load()
    except NoSession as error:
        output.fail(str(error))
    with connected_to(known) as client:
        yield client


@contextmanager
def connected_to(known: Session) -> Iterator[Client]:
    """A client of this server."""
    try:
        with Client(known) as client:
            yield client
    except ProblemError as error:
        output.problem(error)
        if error.status == 401:
            output.err.print("  log in with `volery login`")
        raise SystemExit(1) from None
    except (NotOne, OperationFailed, TimeoutError) as error:
        output.fail(str(error))
    except httpx.TransportError as error:
        output.fail(f"the server can't be reached: {error or type(error).__name__}")


def finish(client: Client, operation: Operation, wait: bool, form: Format) -> Operation:
    """Show an operation: at once, or with a bar until it has ended."""
    if not operation.id:
        output.show(operation.result, form if form is not Format.TABLE else Format.YAML)
        return operation
    if wait and operation.state not in ENDED:
        operation = follow(client, operation)
    if form is not Format.TABLE:
        output.show(operation, form)
    elif operation.state is OperationState.SUCCEEDED:
        output.out.print(
            f"{operation.kind} of {operation.object_name or operation.object_id}: [green]done[/]"
        )
    elif operation.state not in ENDED:
        output.out.print(f"{operation.kind} goes on as operation {operation.id}")
    if operation.problem is not None:
        raise OperationFailed(operation)
    return operation


def follow(client: Client, operation: Operation) -> Operation:
    """The operation once it has ended, with a bar until then."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=output.err, transient=True) as progress:
        bar = progress.add_task(operation.kind, total=100)
        while operation.state not in ENDED:
            step = next((s.title for s in reversed(operation.steps) if s.state not in ENDED), operation.kind)
            progress.update(bar, completed=operation.progress, description=step)
            operation = client.poll(operation, 1)
    return operation


def send(request: Request[A]) -> A:
    with connected() as client:
        return client.send(request)


def operate(request: Request[Operation], wait: bool, form: Format) -> None:
    """Send something that answers with an operation."""
    with connected() as client:
        finish(client, client.send(request), wait, form)


def show_all(resource: Resource[Any], form: Format) -> None:
    """All there are, as its table has them."""
    with connected() as client:
        output.show(list(client.list(resource)), form, resource.columns)


def one(resource: Resource[E], name_or_id: str) -> E:
    with connected() as client:
        return client.find(resource, name_or_id)


def id_of(client: Client, resource: Resource[Any], name_or_id: str) -> str:
    """The id behind a name; "" stays ""."""
    return client.find(resource, name_or_id).id if name_or_id else ""


def add_common(app: typer.Typer, resource: Resource[Any], *, deletes: bool = True) -> None:
    """list, show and delete, the same for every noun."""

    @app.command("list")
    def list_(
        output_format: Output = Format.TABLE,
        search: Annotated[str, typer.Option(help="Part of the name.")] = "",
        filter_: Annotated[list[str] | None, typer.Option("--filter", help="column=value")] = None,
        order_by: Annotated[str, typer.Option(help="A column; - before it for descending.")] = "",
    ) -> None:
        """Show all of them."""
        pairs = dict(item.split("=", 1) for item in filter_ or [] if "=" in item)
        with connected() as client:
            items = list(client.list(resource, search=search, filter=pairs, order_by=order_by))
        output.show(items, output_format, resource.columns)

    @app.command("show")
    def show(name: str, output_format: Output = Format.TABLE) -> None:
        """Show one, by name or id."""
        output.show(one(resource, name), output_format)

    if not deletes:
        return

    @app.command("delete")
    def delete(name: str) -> None:
        """Delete one."""
        with connected() as client:
            found = client.find(resource, name)
            client.send(resource.delete(found.id))
        output.out.print(f"{resource.name} {name}: deleted")
