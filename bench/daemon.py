"""The daemon as a process of its own, as a user starts it: `vbus serve`."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

_READY_S = 20
VBUS = Path(sys.executable).with_name("vbus")


class Daemon:
    """`vbus serve` with this configuration, ended with SIGTERM; on one core if named.

    A context manager.
    """

    def __init__(self, config: str, core: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vbus-bench-")
        self.runtime = Path(self._folder.name)
        path = self.runtime / "vbus.toml"
        path.write_text(config)
        self.environment = {**os.environ, "VBUS_RUNTIME_DIR": str(self.runtime)}
        self._log = self.runtime / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [VBUS, "serve", "--config", path], env=self.environment, stderr=log
            )
        if core is not None:
            os.sched_setaffinity(self.pid, {core})

    @property
    def pid(self) -> int:
        return self._process.pid

    def socket(self, guest: str) -> Path:
        """Give the path of a guest's socket, once it is there."""
        return self._served("guests", guest)

    def function(self, device: str) -> Path:
        """Give the path of an exposed device's socket, once it is there."""
        return self._served("functions", device)

    def _served(self, folder: str, name: str) -> Path:
        path = self.runtime / folder / f"{name}.sock"
        end = time.monotonic() + _READY_S
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} is not served: {self._log.read_text()}")
            time.sleep(0.01)
        return path

    def ask(self, *words: str) -> Any:
        """Run a client command and give its JSON."""
        done = subprocess.run(
            [VBUS, *words, "--json"],
            env=self.environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        return json.loads(done.stdout)

    def private_bytes(self) -> int:
        """Memory that this process alone has."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        private = [line.split()[1] for line in lines if line.startswith("Private_")]
        return sum(map(int, private)) * 1024

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_READY_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class GuestProcess:
    """`vbus guest run`, in whatever namespace `command` enters. A context manager."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def statistics(self) -> Any:
        """Give what the guest counts, as it prints when it gets SIGUSR1."""
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if said["event"] == "statistics":
                return said
        raise RuntimeError("the guest has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=_READY_S)


def guest_command(socket: Path, *options: str) -> list[str | Path]:
    """Give the command that is a guest at this socket."""
    return [VBUS, "guest", "run", socket, "--json", *options]
