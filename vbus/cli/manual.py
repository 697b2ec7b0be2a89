"""Manual pages and shell completions of the command tree, made from it.

    python -m vbus.cli.manual FOLDER

fills FOLDER as it is below /usr: one page for each command (vbus-device-add.1), and a
completion for each shell where that shell looks for it. For packagers; no command of
its own, as who uses vbus has them installed.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

from vbus.cli import vbus

Page = tuple[click.Context, click.Command]

COMPLETIONS: Final = {
    "bash": "share/bash-completion/completions/vbus",
    "zsh": "share/zsh/vendor-completions/_vbus",
    "fish": "share/fish/vendor_completions.d/vbus.fish",
}
EXIT_STATUS: Final = (
    ("0", "Done."),
    ("1", "Refused; one line on standard error says why."),
    ("2", "The command line is wrong."),
    ("3", "No daemon can be reached."),
    ("4", "The daemon did not answer in time."),
    ("77", "The daemon lacks a right."),
    ("78", "The daemon's configuration is wrong."),
    ("130", "Interrupted."),
)
ENVIRONMENT: Final = (
    ("VBUS_RUNTIME_DIR", "Where the daemon has its sockets, by default /run/vbus."),
    ("NO_COLOR", "If set, nothing is coloured."),
)
_ESCAPES: Final = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga"})


def pages(command: click.Command = vbus, *parents: click.Context) -> Iterator[Page]:
    """Give all commands of a tree, each with its context, parents first."""
    parent = parents[-1] if parents else None
    settings = command.context_settings
    context = click.Context(command, parent, info_name=command.name, **settings)
    yield context, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                # Several commands may come from one function, so the place decides.
                child.name = name
                yield from pages(child, *parents, context)


def page(context: click.Context, command: click.Command) -> str:
    """Write one page, in the macros of man(7)."""
    name = context.command_path.replace(" ", "-")
    lines = [
        f'.TH "{_text(name.upper())}" 1 "" "vbus {version("vbus")}" "vbus"',
        ".nh",
        ".SH NAME",
        f"{_text(name)} \\- {_text(_summary(command))}",
        ".SH SYNOPSIS",
        f".B {_text(context.command_path)}",
        _text(" ".join(command.collect_usage_pieces(context))),
        *_description(command),
        *_options(context, command),
        *_commands(context, command),
        *_table("EXIT STATUS", EXIT_STATUS),
        *_table("ENVIRONMENT", ENVIRONMENT),
        *_see_also(context, command),
    ]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Take away all meaning that roff sees in a line."""
    escaped = text.translate(_ESCAPES)
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def _summary(command: click.Command) -> str:
    return command.get_short_help_str(200).rstrip(".")


def _description(command: click.Command) -> Iterator[str]:
    yield ".SH DESCRIPTION"
    help_text = (command.help or _summary(command)).replace("\b", "")
    for number, paragraph in enumerate(help_text.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield from (_text(line.strip()) for line in paragraph.splitlines())


def _options(context: click.Context, command: click.Command) -> Iterator[str]:
    options = [
        one for one in command.get_params(context) if isinstance(one, click.Option)
    ]
    records = [one.get_help_record(context) for one in options]
    return _table("OPTIONS", [record for record in records if record])


def _commands(context: click.Context, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        children = [
            (name, _summary(child))
            for name in command.list_commands(context)
            if (child := command.get_command(context, name)) and not child.hidden
        ]
        yield from _table("COMMANDS", children)


def _table(title: str, entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    if entries:
        yield f".SH {title}"
    for term, text in entries:
        yield from (".TP", rf"\fB{_text(term)}\fP", _text(text))


def _see_also(context: click.Context, command: click.Command) -> Iterator[str]:
    found = []
    if context.parent is not None:
        found.append(context.parent.command_path)
    if isinstance(command, click.Group):
        names = command.list_commands(context)
        found += [f"{context.command_path} {name}" for name in names]
    yield ".SH SEE ALSO"
    names = [one.replace(" ", "-") for one in found]
    yield ", ".join(rf"\fB{_text(name)}\fP(1)" for name in names)


def completion(shell: str) -> str:
    """Give the text that teaches a shell our commands. They ask `vbus` itself."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(vbus, {}, "vbus", "_VBUS_COMPLETE").source()


def install(folder: Path) -> None:
    """Write everything below `folder`."""
    manuals = folder / "share" / "man" / "man1"
    manuals.mkdir(parents=True, exist_ok=True)
    for context, command in pages():
        name = context.command_path.replace(" ", "-")
        (manuals / f"{name}.1").write_text(page(context, command))
    for shell, place in COMPLETIONS.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(completion(shell))


if __name__ == "__main__":
    install(Path(sys.argv[1]))
