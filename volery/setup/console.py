"""What the person at the terminal sees: a line for each step, a spinner while it lasts on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status


class Output:
    """Steps and remarks. Not on a terminal: plain lines, nothing rewritten."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Shows the title while it runs and how it ended; an exception ends it as failed."""
        started = time.monotonic()
        status = self._console.status(title) if self._console.is_terminal else None
        step = Step(title, status)
        if status is not None:
            status.start()
        try:
            yield step
        except BaseException:
            self._end(status)
            self._line("✗", title, "failed", "red")
            raise
        self._end(status)
        seconds = time.monotonic() - started
        took = f"{seconds:.1f} s" if seconds >= 0.1 else ""
        self._line("✓", title, ", ".join(part for part in (step.result, took) if part), "green")

    def _end(self, status: Status | None) -> None:
        if status is not None:
            status.stop()

    def _line(self, mark: str, title: str, result: str, style: str) -> None:
        plain = {"✓": "ok  ", "✗": "FAIL"}[mark]
        mark = f"[{style}]{mark}[/]" if self._console.is_terminal else plain
        self._console.print(f"{mark} {title}" + (f" [dim]({result})[/]" if result else ""))

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]![/] {text}" if self._console.is_terminal else f"!    {text}")

    def say(self, text: str = "") -> None:
        self._console.print(text)

    def fail(self, text: str) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"Volery: {text}")


class Step:
    """A running step: `result` is shown beside it when it is done."""

    def __init__(self, title: str, status: Status | None) -> None:
        self._title = title
        self._status = status
        self.result = ""

    def progress(self, text: str) -> None:
        if self._status is not None:
            self._status.update(f"{self._title}: {text}")


def confirm(question: str, ask: Callable[[str], str] = input) -> bool:
    """Whether the person typed `yes`; without a terminal nobody can, so no."""
    if not sys.stdin.isatty():
        return False
    return ask(f"{question} Type yes to go on: ").strip().lower() == "yes"
