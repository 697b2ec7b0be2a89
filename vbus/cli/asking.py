"""What the client commands share: one request to the daemon, and how to show it."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click
import trio

from vbus.config import runtime_dir
from vbus.control.client import ControlClient

if TYPE_CHECKING:
    from rich.console import Console

_NO_LIMIT = 1 << 16

as_json = click.option(
    "-j", "--json", "as_json", is_flag=True, help="Print JSON, for programs."
)


def client() -> ControlClient:
    """Give a client of the daemon that this user means."""
    return ControlClient(runtime_dir() / "control.sock")


def ask(op: str, **args: object) -> Any:
    """Ask the daemon one thing. Raises VbusError, trio.TooSlowError."""
    timeout_s = click.get_current_context().find_root().params["timeout"]

    async def run() -> Any:
        with trio.fail_after(timeout_s):
            async with client() as control:
                return await control.request(op, **args)

    return trio.run(run)


def act(op: str, *, as_json: bool, **args: object) -> None:
    """Ask for a change; silent if it is done, unless what came of it is wanted."""
    done = ask(op, **args)
    if as_json:
        print_json(done)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def console() -> "Console":
    """Give where tables go: as wide as the terminal, or without a limit for programs.

    Honours NO_COLOR.
    """
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=_NO_LIMIT)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """Print a table that fits the terminal; whole lines where there is none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=box.SIMPLE, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def printable(value: object) -> str:
    """Make text that cannot steer a terminal."""
    return "".join(one if one.isprintable() else "\ufffd" for one in str(value))


def settings(words: Sequence[str]) -> dict[str, str]:
    """Take KEY=VALUE words."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise click.UsageError(f"{word!r} is not KEY=VALUE")
        found[key] = value
    return found
