"""What the client commands share: one request to the daemon, and how to show it."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
import trio

from vbus.config import runtime_dir
from vbus.control.client import ControlClient

_TIMEOUT_S = 30
Function = TypeVar("Function", bound=Callable[..., Any])

as_json = click.option(
    "-j", "--json", "as_json", is_flag=True, help="Print JSON, for programs."
)


def client() -> ControlClient:
    """Give a client of the daemon that this user means."""
    return ControlClient(runtime_dir() / "control.sock")


def ask(op: str, **args: object) -> Any:
    """Ask the daemon one thing. Raises VbusError, trio.TooSlowError."""

    async def run() -> Any:
        with trio.fail_after(_TIMEOUT_S):
            async with client() as control:
                return await control.request(op, **args)

    return trio.run(run)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """Print a table that fits the terminal; whole lines where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=box.SIMPLE, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)


def settings(words: Sequence[str]) -> dict[str, str]:
    """Take KEY=VALUE words."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise click.UsageError(f"{word!r} is not KEY=VALUE")
        found[key] = value
    return found
