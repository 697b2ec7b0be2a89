"""Devices and guests come and go, all of them processes started by commands."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tests.system.served import WITHIN_S, Served

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
[[guest]]
name = "g2"
bus = "bus0"
"""


class Lines:
    """The JSON lines a command prints, as they come."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines: Queue[dict[str, Any]] = Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self._lines.put(json.loads(line))

    def until(self, within_s: float = WITHIN_S, /, **wanted: object) -> dict[str, Any]:
        """Give the next object with these values; what comes before is passed over.

        Raises Empty if it does not come.
        """
        while True:
            said = self._lines.get(timeout=within_s)
            if wanted.items() <= said.items():
                return said

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()


@contextmanager
def running(daemon: Served, *words: str | Path) -> Iterator[Lines]:
    """A command that goes on until it is ended, with --json."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vbus", *words, "--json"],
        env=daemon.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = Lines(process)
    try:
        yield lines
    finally:
        lines.end()


def guest(daemon: Served, name: str = "g1") -> Any:
    return running(daemon, "guest", "run", daemon.socket(name))


def done(daemon: Served, *words: str) -> None:
    finished = daemon.vbus(*words)
    assert finished.returncode == 0, finished.stderr


def test_devices_added_and_removed_live_reach_an_attached_guest(
    tmp_path: Path,
) -> None:
    """R8, R11: hot plug is an event, down to a driver that starts and ends."""
    with Served(tmp_path, CONFIG) as daemon, guest(daemon) as lines:
        lines.until(event="attached")
        lines.until(name="echo0", state="running")
        done(daemon, "device", "add", "echo1", "--class", "echo", "--bus", "bus0")
        added = lines.until(name="echo1", state="running")
        assert (added["id"], added["type"]) == (1, "org.vbus.echo")
        done(daemon, "device", "del", "echo1")
        lines.until(name="echo1", state="gone")
        done(daemon, "device", "add", "echo1", "--class", "echo", "--bus", "bus0")
        again = lines.until(name="echo1", state="running")
        assert again["id"] == 2  # never reused (R2)
        done(daemon, "device", "unlink", "bus0", "echo0")
        lines.until(name="echo0", state="gone")
        done(daemon, "device", "link", "bus0", "echo0")
        assert lines.until(name="echo0", state="running")["id"] == 3


def test_a_device_goes_to_every_guest_of_its_bus(tmp_path: Path) -> None:
    with (
        Served(tmp_path, CONFIG) as daemon,
        guest(daemon, "g1") as first,
        guest(daemon, "g2") as second,
    ):
        for lines in (first, second):
            lines.until(event="attached")
        done(daemon, "device", "add", "late", "--class", "echo", "--bus", "bus0")
        states = {
            lines.until(name="late", state="starting")["id"]
            for lines in (first, second)
        }
        assert len(states) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_that_ends_leaves_its_place_to_the_next(
    tmp_path: Path, number: signal.Signals
) -> None:
    """R60, R61: however it ended, `vbus events` tells, and another can attach."""
    with Served(tmp_path, CONFIG) as daemon, running(daemon, "events") as events:
        events.until(event="start")
        with guest(daemon) as first:
            first.until(name="echo0", state="running")
            events.until(event="guest-attached", guest="g1")
            assert daemon.ask("device", "show", "echo0")[0]["connections"] == ["g1"]
            first.process.send_signal(number)
            events.until(event="guest-left", guest="g1")
        assert daemon.ask("device", "show", "echo0")[0]["connections"] == []
        with guest(daemon) as second:
            second.until(name="echo0", state="running")
            assert daemon.ask("guest", "show", "g1")[0]["attached"] is True
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(WITHIN_S) == 0


def test_a_second_client_on_a_guests_socket_is_refused(tmp_path: Path) -> None:
    with Served(tmp_path, CONFIG) as daemon, guest(daemon) as first:
        first.until(name="echo0", state="running")
        second = daemon.vbus("guest", "run", str(daemon.socket("g1")))
        assert second.returncode == 1
        assert second.stderr.startswith("vbus: ")
        assert second.stderr.count("\n") == 1
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(WITHIN_S) == 0


def test_a_stopped_guest_holds_up_nobody(tmp_path: Path) -> None:
    """R51: a guest that does not run keeps its queue full, others go on."""
    with (
        Served(tmp_path, CONFIG) as daemon,
        guest(daemon, "g1") as stopped,
        guest(daemon, "g2") as other,
    ):
        stopped.until(event="attached")
        other.until(event="attached")
        os.kill(stopped.process.pid, signal.SIGSTOP)
        for nth in range(3):
            done(daemon, "device", "add", f"e{nth}", "--class", "echo", "--bus", "bus0")
            other.until(name=f"e{nth}", state="running")
        os.kill(stopped.process.pid, signal.SIGCONT)
        stopped.until(name="e2", state="starting")


def test_the_daemon_ends_while_guests_are_attached(tmp_path: Path) -> None:
    """The guest says in one line that its host has gone, and fails."""
    with Served(tmp_path, CONFIG) as daemon, guest(daemon) as lines:
        lines.until(name="echo0", state="running")
        assert daemon.stop() == 0
        assert lines.process.wait(WITHIN_S) == 1
