"""`vbus serve` as a process of its own, for the tests of the whole product."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WITHIN_S = 60


class Served:
    """A daemon on a runtime directory; a context manager that ends it with SIGTERM."""

    def __init__(
        self,
        folder: Path,
        config: str = "",
        words: Sequence[str] = (),
        modules: Path | None = None,
    ) -> None:
        """Start it with further `words` of `vbus serve`, and a folder of modules."""
        self.runtime = folder / "run"
        self.log = folder / "log"
        self._path = folder / "vbus.toml"
        self._path.write_text(config)
        self._words = words
        self.environment = {**os.environ, "VBUS_RUNTIME_DIR": str(self.runtime)}
        if modules is not None:
            self.environment["PYTHONPATH"] = str(modules)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        # Ends with the test's process too, where that forgets or cannot end it.
        guard = ["setpriv", "--pdeathsig", "TERM", sys.executable]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    *guard,
                    "-m",
                    "vbus",
                    "serve",
                    "--config",
                    self._path,
                    *self._words,
                ],
                env=self.environment,
                stderr=log,
            )

    def wait_ready(self) -> None:
        """Wait for the control socket, which comes last."""
        end = time.monotonic() + WITHIN_S
        while b"ready in" not in self.log.read_bytes():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()

    def socket(self, guest: str) -> Path:
        return self.runtime / "guests" / f"{guest}.sock"

    def vbus(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a client command."""
        return subprocess.run(
            [sys.executable, "-m", "vbus", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )

    def ask(self, *words: str) -> Any:
        """Run a client command and give its JSON."""
        done = self.vbus(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    # What the process holds

    @property
    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def mappings(self) -> int:
        """Mappings of memory files: guests' memory, and areas of connections."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        return sum("memfd:" in line for line in maps.splitlines())

    @property
    def private_kib(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "Private_" in line)

    # Ends

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WITHIN_S)

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            try:
                status = self.stop()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
            assert status == 0 or error, self.log.read_text()
