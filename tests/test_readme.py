"""What the README shows is what is there, and it runs."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.dice import Dice
from vbus.bus import BusModel
from vbus.errors import InvalidError
from vbus.testing import check_device

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DEADLINE_S = 20


def shown() -> dict[str, str]:
    """The programs in the README, by the file they are said to be."""
    block = re.compile(r"<!-- (\S+) -->\n```python\n(.*?)```", re.DOTALL)
    return dict(block.findall(README))


def shell_lines() -> list[str]:
    """The commands in the README."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_examples_are_shown_as_they_are() -> None:
    """A program in the README is a file of the project, word for word."""
    programs = shown()
    assert set(programs) == {"examples/dice.py", "examples/throw.py"}
    for name, text in programs.items():
        assert text == (ROOT / name).read_text(), name


def test_first_commands_are_targets_of_make() -> None:
    """The README begins with the two commands that matter."""
    words = [shlex.split(line, comments=True) for line in shell_lines()[:2]]
    assert words == [["make", "demo"], ["make", "test"]]


def test_every_folder_it_lists_is_there() -> None:
    """R60: a reader finds what the table names."""
    folders = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    named = [name for cell in folders for name in re.findall(r"`(\w+/)`", cell)]
    assert len(named) >= 9
    assert all((ROOT / name).is_dir() for name in named)


def test_every_page_it_links_is_there() -> None:
    """Links within the project lead somewhere."""
    for link in re.findall(r"\]\(([^)]*)\)", README):
        assert (ROOT / link).is_file(), link


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[str]:
    """Run a device's program; give what it says first. It must end well on SIGTERM."""
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process, process.stderr:
        try:
            yield process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def test_shown_device_runs_and_answers_the_shown_guest(tmp_path: Path) -> None:
    """R4, R60, R61: the programs of the README, run by the commands of the README."""
    (tmp_path / "examples").mkdir()
    for name, text in shown().items():
        (tmp_path / name).write_text(text)
    device, guest = (
        [sys.executable, *shlex.split(line.rstrip("&"))[1:]]
        for line in shell_lines()
        if line.startswith(".venv/bin/python examples/")
    )
    with running(device, tmp_path) as said:
        assert said == "org.example.dice at dice.sock\n"
        done = subprocess.run(
            guest,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            check=True,
            timeout=DEADLINE_S,
        )
    throws = [int(word) for word in done.stdout.split()]
    assert len(throws) == 5
    assert all(1 <= throw <= 20 for throw in throws)


async def test_shown_device_conforms() -> None:
    """R4: it stands what guests do to it."""
    await check_device(Dice)


@pytest.mark.parametrize("sides", ["1", "256", "many"])
def test_shown_device_refuses_what_is_no_die(sides: str) -> None:
    """R11: the README's device is an example of checking attributes, too."""
    with pytest.raises(InvalidError, match="sides"):
        BusModel({"dice": Dice}).add_device("dice", "dice", {"sides": sides})
