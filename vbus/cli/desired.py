"""`vbus save|apply`: the running state as a file, and a file as the running state."""

import os
import stat
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from vbus.cli import EXIT_REFUSED
from vbus.cli.asking import as_json, ask, console, print_json, printable
from vbus.errors import ConfigError

_NEW_FILE = 0o644
_STYLES = {"+": "green", "-": "red", "~": "yellow"}
_SIGNS = {"add": "+", "link": "+", "remove": "-", "unlink": "-", "set": "~"}


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), default="-")
@as_json
def save(file: Path, as_json: bool) -> None:
    """Write what there is as a configuration: to FILE, or to the standard output.

    `vbus serve --config FILE` makes the same again. Attributes that nobody gave are
    left at their defaults. A FILE is replaced as a whole or not at all.
    """
    document = ask("config")
    if as_json:
        print_json(document)
        return
    import tomli_w

    text = tomli_w.dumps(document)
    if str(file) == "-":
        click.echo(text, nl=False)
    else:
        _replace(file, text)


def _replace(file: Path, text: str) -> None:
    """Put a new file in the place of an old one, with the mode of that."""
    file = file.resolve()  # a link stays a link
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except FileNotFoundError:
        mode = _NEW_FILE
    fd, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with open(fd, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.replace(temporary, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--dry-run", "-n", is_flag=True, help="Show what would be done.")
@click.option(
    "--force", is_flag=True, help="Make anew what must be, also if it is in use."
)
@as_json
@click.pass_context
def apply(
    context: click.Context, file: Path, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Make what there is as FILE says, and print each step.

    What is the same is not touched. What cannot be changed in place is made anew; if
    it is in use only with --force. If not all of it could be done, the status is 1.
    """
    steps = ask("apply", document=_read(file), dry_run=dry_run, force=force)
    if as_json:
        print_json({"steps": steps})
    else:
        out = console()
        for step in steps:
            for text, style in _lines(step):
                out.print(printable(text), style=style, markup=False, highlight=False)
    if any("error" in step for step in steps):
        context.exit(EXIT_REFUSED)


def _read(file: Path) -> dict[str, Any]:
    with click.open_file(str(file), "rb") as source:
        try:
            return tomllib.loads(source.read().decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from None


def _lines(step: dict[str, Any]) -> list[tuple[str, str]]:
    """Show a step: what is done, its changes, and why it is not done."""
    sign = _SIGNS[step["op"].partition(".")[2]]
    lines = [(f"{sign} {step['about']}{_more(step)}", _STYLES[sign])]
    for name, (before, after) in step["changes"].items():
        if step["op"] not in ("device.link", "device.unlink"):
            lines.append((f"    {name}: {before} -> {after}", "yellow"))
    if "error" in step:
        lines.append((f"    not done: {step['error']}", "bold red"))
    return lines


def _more(step: dict[str, Any]) -> str:
    args = step["args"]
    if step["op"] == "device.add":
        words = [f"class {args['class_name']}", *(f"on {bus}" for bus in args["buses"])]
        words += [f"{name}={value}" for name, value in args["attributes"].items()]
        return f": {', '.join(words)}"
    if step["op"] == "guest.add":
        return f" on {args['guest']['bus']}"
    if step["op"] in ("device.link", "device.unlink"):
        return f" {'on' if step['op'] == 'device.link' else 'off'} {args['bus']}"
    return " (to be made anew)" if "remove" in step["op"] and step["changes"] else ""
