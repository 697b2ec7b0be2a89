"""Manual pages and completions, read by the tools that will read them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vbus.cli import manual, vbus

TREE = [(context.command_path, command) for context, command in manual.pages()]


def needs(program: str) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None
    return pytest.mark.skipif(missing, reason=f"no {program} here")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usr")
    command = [sys.executable, "-m", "vbus.cli.manual", folder]
    subprocess.run(command, check=True, timeout=60)
    return folder


def run(*words: str, **environment: str) -> str:
    """Run a program beside this environment's `vbus`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        words,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def plain(text: str) -> str:
    """What man prints, without its overstrikes and line ends."""
    return " ".join(re.sub(".\b", "", text).split())


def test_each_command_has_a_page(installed: Path) -> None:
    """R11: also those that come by entry point."""
    names = {path.stem for path in (installed / "share/man/man1").iterdir()}
    assert names == {path.replace(" ", "-") for path, _ in TREE}
    assert {"vbus", "vbus-serve", "vbus-device-add", "vbus-guest-run"} <= names


@needs("groff")
@pytest.mark.parametrize("path", [path for path, _ in TREE])
def test_a_page_is_proper_roff_and_tells_all(path: str, installed: Path) -> None:
    """Formatted without a warning; every option and its help is there."""
    command = dict(TREE)[path]
    file = installed / "share/man/man1" / f"{path.replace(' ', '-')}.1"
    text = plain(run("groff", "-man", "-Tutf8", "-ww", "-P-cbou", str(file)))
    text = text.replace("‐", "-").replace("−", "-")
    assert f"{path.replace(' ', '-')} - " in text
    assert "-h, --help" in text
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.opts[0] in text
            assert (param.help or "").split(".")[0][:20] in text
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            assert f"{path.replace(' ', '-')}-{name}(1)" in text


@needs("mandoc")
def test_a_second_reader_finds_no_errors(installed: Path) -> None:
    files = sorted(map(str, (installed / "share/man/man1").iterdir()))
    run("mandoc", "-Tlint", "-Werror", *files)


def test_what_roff_would_obey_is_only_text() -> None:
    @click.command(name="odd", help=".SH INJECTED\n\n'br \\fBbold")
    @click.option("--level", help="Use \\n and -1.")
    def odd(level: str) -> None: ...

    text = manual.page(click.Context(odd, info_name="odd"), odd)
    assert "\n\\&.SH INJECTED\n" in text
    assert "\n\\(aqbr \\efBbold\n" in text
    assert "Use \\en and \\-1." in text


# Completions


@needs("bash")
def test_bash_completes(installed: Path) -> None:
    file = installed / manual.COMPLETIONS["bash"]
    script = (
        f"source {file}; COMP_WORDS=(vbus device sh); COMP_CWORD=2;"
        " _vbus_completion vbus; echo ${COMPREPLY[@]}"
    )
    assert run("bash", "--norc", "-c", script) == "show\n"


@needs("fish")
def test_fish_completes(installed: Path, tmp_path: Path) -> None:
    file = installed / manual.COMPLETIONS["fish"]
    script = f"source {file}; complete -C 'vbus guest qemu-'"
    found = run("fish", "--no-config", "-c", script, HOME=str(tmp_path))
    assert found.split("\t")[0].strip() == "qemu-args"


@needs("zsh")
def test_zsh_completes(installed: Path) -> None:
    """Its completion needs a terminal; here it is read, and asked what it asks."""
    file = installed / manual.COMPLETIONS["zsh"]
    assert file.read_text().splitlines()[0] == "#compdef vbus"
    run("zsh", "-f", "-n", str(file))
    found = run(
        "vbus",
        COMP_WORDS="vbus dev",
        COMP_CWORD="1",
        _VBUS_COMPLETE="zsh_complete",
    )
    assert found.splitlines()[:2] == ["plain", "device"]


def test_the_tree_is_that_of_the_command() -> None:
    assert TREE[0] == ("vbus", vbus)
    assert len({path for path, _ in TREE}) == len(TREE)
