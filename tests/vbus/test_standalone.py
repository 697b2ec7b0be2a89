"""`main(MyDevice)`: a device of its own, run as its author runs it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from vbus import Connection, Device, attribute, call, main

class Greeter(Device):
    '''Greets.'''
    type = "org.vbus.greeter"
    word = attribute(str, default="hello")

    @call(0)
    def greet(self, connection: Connection, data: bytes) -> bytes:
        return self.word.encode()[: len(data)]

if __name__ == "__main__":
    main(Greeter)
"""


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    (folder / "greeter.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(folder / "greeter.py"), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_comes(tmp_path: Path, number: signal.Signals) -> None:
    program = start(tmp_path, "--socket", "here.sock", "word=hi")
    assert program.stderr is not None
    assert program.stderr.readline() == "org.vbus.greeter at here.sock\n"
    assert (tmp_path / "here.sock").is_socket()
    program.send_signal(number)
    assert program.wait(20) == 0
    assert not (tmp_path / "here.sock").exists()
    program.communicate()


@pytest.mark.parametrize("argument", ["word", "colour=red"])
def test_bad_arguments_are_one_line(tmp_path: Path, argument: str) -> None:
    _, errors = (program := start(tmp_path, argument)).communicate(timeout=20)
    assert program.returncode == 1
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1
