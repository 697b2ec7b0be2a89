"""Builds harness.c with sanitizers, and talks to it."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INCLUDE = ("shm/include", "ioq/include", "vbus/net/include")
FLAGS = ("-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Harness:
    """The running program; any report of a sanitizer ends it."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ask(self, what: bytes, data: bytes) -> bytes:
        """One case. AssertionError with the sanitizer's report if it crashed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(what + struct.pack("<I", len(data)) + data)
            stdin.flush()
        except BrokenPipeError:
            self._crashed()
        head = stdout.read(4)
        if len(head) < 4:
            self._crashed()
        return stdout.read(struct.unpack("<I", head)[0])

    def _crashed(self) -> None:
        assert self._process.stderr is not None
        raise AssertionError(self._process.stderr.read().decode())

    def close(self) -> None:
        _, errors = self._process.communicate(timeout=20)
        assert (self._process.returncode, errors) == (0, b"")


def build(folder: Path) -> Path:
    """Compile; skips where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = folder / "harness"
    include = [f"-I{ROOT / path}" for path in INCLUDE]
    source = Path(__file__).with_name("harness.c")
    command = [compiler, *FLAGS, *SANITIZE, *include, source, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    return program
