"""`volery login`, `logout`, `user`, `token`, `event-reader`: who may do what."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import httpx
import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api, session
from volery.client.request import Request, body_of
from volery.contracts.account import (
    CreateEventReader,
    CreateUser,
    EventReaderCredentials,
    IssuedToken,
    Login,
    Scope,
)
from volery.contracts.base import Owner

users = typer.Typer(help="Local accounts.", no_args_is_help=True)
work.add_common(users, api.USERS)
tokens = typer.Typer(help="Tokens for programs.", no_args_is_help=True)
work.add_common(tokens, api.TOKENS)
readers = typer.Typer(help="Outside systems that follow the event stream.", no_args_is_help=True)
work.add_common(readers, api.EVENT_READERS)


def login(
    url: Annotated[str, typer.Argument(help="https://HOST:PORT; else the server known already.")] = "",
    name: Annotated[str, typer.Option(help="Account.")] = "admin",
    password_file: Annotated[Path | None, typer.Option(help="Else you are asked.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Certificate authority of the server.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Trust the server's own CA at first sight.")] = False,
) -> None:
    """Log in, and stay logged in."""
    if not url:
        try:
            known = session.load()
            url, ca_file = known.url, ca_file or (Path(known.ca_file) if known.ca_file else None)
        except session.NoSession as error:
            output.fail(str(error))
    if trust and ca_file is None:
        ca_file = _fetch_ca(url)
    password = (
        password_file.read_text().strip() if password_file else typer.prompt("Password", hide_input=True)
    )
    unknown = session.Session(url=url, ca_file=str(ca_file or ""))
    question = Login(name=name, password=password)
    with work.connected_to(unknown) as client:
        issued = client.send(Request("POST", "sessions", IssuedToken, body_of(question)))
    path = session.save(session.Session(url=url, token=issued.secret, ca_file=str(ca_file or "")))
    output.out.print(f"logged in to {url} as {name} until {issued.token.expires_at:%Y-%m-%d %H:%M} ({path})")


def _fetch_ca(url: str) -> Path:
    """The server's CA, unverified: shown, so that a person can compare it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    pem = httpx.get(f"{url}/ca.pem", verify=context).raise_for_status().text
    path = session.user_file().with_name(f"ca-{urlsplit(url).hostname}.pem")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(pem)
    output.err.print(
        f"trusting the authority of {url}, kept in {path}; compare its fingerprint with the server's"
    )
    return path


def logout() -> None:
    """End this session's token and forget it."""
    with work.connected() as client:
        token_id = client.session.token.split("_")[1] if client.session.token.count("_") > 1 else ""
        if token_id:
            client.send(api.TOKENS.delete(token_id))
    session.user_file().unlink(missing_ok=True)


@users.command("create")
def create_user(
    name: str, password_file: Path | None = None, full_name: str = "", output_format: Output = Format.TABLE
) -> None:
    """Make a local account."""
    password = (
        password_file.read_text().strip()
        if password_file
        else typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    )
    question = CreateUser(name=name, password=password, full_name=full_name)
    output.show(work.send(api.USERS.create(question)), output_format)


@tokens.command("create")
def create_token(
    description: str,
    scope: Annotated[list[Scope] | None, typer.Option(help="read, write, admin")] = None,
    days: float = 30,
    name: Annotated[str, typer.Option(help="Account.")] = "admin",
    password_file: Path | None = None,
) -> None:
    """A token for a program; shown once."""
    password = (
        password_file.read_text().strip() if password_file else typer.prompt("Password", hide_input=True)
    )
    question = Login(
        name=name,
        password=password,
        scopes=tuple(scope or [Scope.READ]),
        expires_seconds=int(days * 86400),
        description=description,
    )
    with work.connected() as client:
        issued = client.send(Request("POST", "sessions", IssuedToken, body_of(question)))
    output.out.print(issued.secret, soft_wrap=True)


@readers.command("create")
def create_reader(
    name: str,
    owner: Annotated[list[Owner] | None, typer.Option(help="Whose facts; else all.")] = None,
    directory: Annotated[Path, typer.Option(help="Where the credentials go.")] = Path("."),
) -> None:
    """Read-only credentials for an outside system, in two files; shown nowhere else."""
    question = CreateEventReader(name=name, owners=tuple(owner or ()))
    made = work.send(api.EVENT_READERS.create(question, EventReaderCredentials))
    creds, ca = directory / f"{name}.creds", directory / f"{name}-ca.pem"
    creds.touch(mode=0o600)
    creds.write_text(made.creds)
    ca.write_text(made.ca_pem)
    output.show(
        {
            "servers": list(made.servers),
            "consumers": made.consumers,
            "inbox_prefix": made.inbox_prefix,
            "credentials": str(creds),
            "ca": str(ca),
        },
        Format.YAML,
    )
