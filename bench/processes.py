"""Starting what is measured: C tools built on demand, Python workers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BUILT = HERE.parent / ".cache" / "bench"

CORES = sorted(os.sched_getaffinity(0))
NEAR, FAR = CORES[0], CORES[-1]
"""The two cores a pair of processes is pinned to, as the C probe does."""


class Skipped(Exception):
    """This cannot be measured here; the message says what is missing."""


def c_tool(source: str) -> Path:
    """Compile a C file of this folder, if it is newer than what was built before."""
    path = HERE / source
    tool = _BUILT / path.stem
    if not tool.exists() or tool.stat().st_mtime < path.stat().st_mtime:
        _BUILT.mkdir(parents=True, exist_ok=True)
        compiler = [os.environ.get("CC", "cc"), "-O2", "-Wall", "-Wextra"]
        subprocess.run([*compiler, "-o", tool, path], check=True)
    return tool


def output(*command: str | Path) -> str:
    """Run to the end and give what it printed."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def probe(*arguments: object) -> list[float]:
    """Run the C probe: see bench/probe.c."""
    return [float(word) for word in _probe(arguments).split()]


def _probe(arguments: Sequence[object]) -> str:
    return output(c_tool("probe.c"), *map(str, arguments))


class Worker:
    """A Python worker of this folder: `python -m bench.MODULE ARGUMENTS`."""

    def __init__(
        self, module: str, *arguments: object, fds: Sequence[int] = ()
    ) -> None:
        command = [sys.executable, "-m", f"bench.{module}", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, pass_fds=fds, stdout=subprocess.PIPE, cwd=HERE.parent
        )

    def result(self, timeout_s: float = 60) -> Any:
        """Wait for the end and give the JSON it printed."""
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise
        if self._process.returncode:
            raise RuntimeError(f"{self._process.args!r} failed")
        return json.loads(out)

    def stop(self) -> None:
        """End it now. Safe to repeat."""
        self._process.kill()
        self._process.communicate()


def pin(core: int) -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, {core})


def report(result: object) -> None:
    """Print what `Worker.result` gives."""
    print(json.dumps(result))
