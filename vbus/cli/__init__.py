"""The command `vbus`: a tree of commands, each loaded when it is asked for.

Ours are in the modules beside this one. Other packages add theirs by entry points of
the group "vbus.commands", whose name is the place in the tree: "guest.run".
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import trio

from vbus.errors import UnreachableError, VbusError, innermost

ENTRY_POINT_GROUP = "vbus.commands"
EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_TIMEOUT, EXIT_INTERRUPTED = 1, 3, 4, 130

OWN = {
    "serve": "vbus.cli.serve:serve",
    "demo": "vbus.cli.demo:demo",
    "backend": "vbus.cli.backends:backend",
    "bus": "vbus.cli.objects:bus",
    "compare": "vbus.cli.compare:compare",
    "class": "vbus.cli.objects:device_class",
    "device": "vbus.cli.objects:device",
    "guest": "vbus.cli.objects:guest",
    "apply": "vbus.cli.desired:apply",
    "save": "vbus.cli.desired:save",
    "capture": "vbus.cli.capture:capture",
    "events": "vbus.cli.watching:events",
    "stats": "vbus.cli.watching:stats",
    "top": "vbus.cli.top:top",
    "trace": "vbus.cli.trace:trace",
    "tree": "vbus.cli.watching:tree",
}


class Tree(click.Group):
    """A group that also holds the commands at its place in the entry points."""

    def __init__(self, *args: Any, place: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._place = place

    def _added(self) -> dict[str, EntryPoint]:
        prefix = f"{self._place}." if self._place else ""
        found = {}
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            name = entry.name.removeprefix(prefix)
            if entry.name.startswith(prefix) and "." not in name:
                found[name] = entry
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._added()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = self._added().get(cmd_name)
        return None if entry is None else _loaded(entry)


class _Root(Tree):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *OWN})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in OWN:
            return super().get_command(ctx, cmd_name)
        module, _, name = OWN[cmd_name].partition(":")
        return _command(getattr(import_module(module), name))


def _loaded(entry: EntryPoint) -> click.Command | None:
    """Load a command of somebody's; None, and a line about it, if it is broken."""
    try:
        found = entry.load()
        if isinstance(found, click.Command):
            return found
        reason = f"{entry.value} is no command"
    except Exception as error:  # whatever a stranger's module does
        reason = f"{type(error).__name__}: {error}"
    package = f" of {entry.dist.name}" if entry.dist else ""
    text = " ".join(f"the command {entry.name!r}{package} is broken: {reason}".split())
    click.echo(f"vbus: {text}", err=True)
    return None


def _command(found: object) -> click.Command:
    assert isinstance(found, click.Command)
    return found


@click.command(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vbus")
@click.option(
    "-R",
    "--runtime-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the daemon has its sockets.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, 86400),
    default=30,
    show_default=True,
    help="Seconds to wait for the daemon's answer.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def vbus(runtime_dir: Path | None, timeout: float, debug: bool) -> None:
    """A device bus for guests, in user space."""
    if runtime_dir is not None:
        os.environ["VBUS_RUNTIME_DIR"] = str(runtime_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit; errors are one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = vbus.main(words, prog_name="vbus", standalone_mode=False)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        status = _explain(error, debug="--debug" in words)
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong and give the exit status; re-raise what is a bug."""
    error = innermost(error)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, click.ClickException):
        _show(error)
        return error.exit_code
    if debug:
        traceback.print_exception(error)
    elif not isinstance(error, VbusError | OSError | trio.TooSlowError):
        raise error
    if isinstance(error, trio.TooSlowError):
        click.echo("vbus: the daemon does not answer", err=True)
        return EXIT_TIMEOUT
    click.echo(f"vbus: {error}", err=True)
    unreachable = isinstance(error, UnreachableError)
    return EXIT_UNREACHABLE if unreachable else EXIT_REFUSED


def _show(error: click.ClickException) -> None:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    where = getattr(error, "ctx", None)
    hint = f" (see '{where.command_path} --help')" if where is not None else ""
    click.echo(f"vbus: {error.format_message()}{hint}", err=True)
