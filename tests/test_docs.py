"""What the pages of docs/ show exists: configurations, commands, links."""

import re
import shlex
from pathlib import Path

import click
import pytest

from vbus import config
from vbus.cli import vbus

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for text in blocks(page, "sh") for line in [text]]
    found = "\n".join(lines).splitlines()
    return sorted({line for line in found if line.startswith("vbus ")})


def test_shown_configuration_is_one() -> None:
    """R11: vbus.toml of the documentation is taken as it stands."""
    [text] = blocks(DOCS / "run-it.md", "toml")
    shown = config.parse(text)
    assert [guest.name for guest in shown.guests] == ["g1"]
    assert {device.class_name for device in shown.devices} == {
        "switch",
        "switch-tap",
        "venet",
    }


@pytest.mark.parametrize("text", blocks(DOCS / "operate.md", "toml"))
def test_shown_settings_of_the_daemon_are_taken(text: str) -> None:
    """Each piece stands for itself."""
    assert config.parse(text).daemon != config.DaemonConfig()


@pytest.mark.parametrize("line", commands())
def test_shown_command_exists(line: str) -> None:
    """Each command of the pages is in the tree, with the options that are shown."""
    words = shlex.split(line)[1:]
    command: click.Command = vbus
    context = click.Context(command)
    while isinstance(command, click.Group) and words and words[0][0] != "-":
        found = command.get_command(context, words.pop(0))
        assert found is not None
        command = found
    command.make_context("vbus", words, resilient_parsing=True)
    known = {name for param in command.params for name in param.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Links relative to a page name a file."""
    for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).is_file(), link
