"""What is measured: a daemon and a guest, both processes as a user starts them.

A way to show devices (`Way`) is set up by control requests, so that a device can come
while the guest runs. Nothing here knows what is made of the numbers.
"""

import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import trio

from vbus.control.client import ControlClient
from vbus.errors import UnreachableError, VbusError

READY_S = 20.0
_POLL_S = 0.02


class SubjectError(VbusError):
    """A daemon or guest under measurement failed; the message says what it said."""


@dataclass(slots=True)
class Host:
    """A running daemon and a connection to it."""

    pid: int
    runtime: Path
    control: ControlClient

    def socket(self, guest: str) -> str:
        """Where a guest is served."""
        return str(self.runtime / "guests" / f"{guest}.sock")

    @property
    def fds(self) -> int:
        """File descriptors that the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def memory(self) -> int:
        """Bytes of memory that are the daemon's alone."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(at.split()[1]) for at in lines if "Private_" in at)

    async def accesses(self) -> dict[str, int]:
        """Accesses that it has answered at all functions since each was attached to."""
        shown = await self.control.request("guest.show")
        shown += await self.control.request("device.show")
        totals: dict[str, int] = {}
        for one in shown:
            for name, value in one.get("since_attach", {}).items():
                totals[name] = totals.get(name, 0) + value
        return totals


@asynccontextmanager
async def daemon() -> AsyncIterator[Host]:
    """Run an empty daemon. Raises SubjectError if it does not come up."""
    with tempfile.TemporaryDirectory(prefix="vbus-compare-") as name:
        folder = Path(name)
        config = folder / "vbus.toml"
        config.write_text("")
        runtime = folder / "run"
        environment = {**os.environ, "VBUS_RUNTIME_DIR": str(runtime)}
        command = [sys.executable, "-m", "vbus", "serve", "--config", str(config)]
        log = folder / "log"
        with log.open("wb") as stderr:
            process = await trio.lowlevel.open_process(
                command, stderr=stderr, env=environment, start_new_session=True
            )
        try:
            async with await _connect(runtime / "control.sock", process, log) as client:
                yield Host(process.pid, runtime, client)
        finally:
            await _end(process)


async def _connect(path: Path, process: trio.Process, log: Path) -> ControlClient:
    """Wait until it listens; gives a client that is still to be entered."""
    with trio.move_on_after(READY_S):
        while process.poll() is None:
            try:
                async with ControlClient(path) as client:
                    await client.request("bus.show")
                return ControlClient(path)
            except UnreachableError:
                await trio.sleep(_POLL_S)
    raise SubjectError(f"the daemon did not come up: {_last(log)}")


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(READY_S):
            await process.wait()
            return
        process.kill()
        await process.wait()


def _last(log: Path) -> str:
    """Give the last line of what a process said."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


class Way(ABC):
    """A way to show devices to a guest."""

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    """What its guest is told."""

    @abstractmethod
    async def add(self, host: Host, number: int) -> str | None:
        """Add a device; give the socket of the function that came with it, if any."""


class OneBridge(Way):
    """All devices on one bus, behind one function."""

    name = "vbus-bridge"
    title = "one bridge"

    async def add(self, host: Host, number: int) -> str | None:
        if number == 0:
            await _add_guest(host, "bus0")
        await _add_device(host, number, "bus0")
        return host.socket("bus0") if number == 0 else None


class FunctionEach(Way):
    """Each device behind a function of its own, on a bus where there is no other.

    The same devices, served by the same code: what differs is the number of functions.
    """

    name = "function-each"
    title = "a function each"
    options = ("--each",)

    async def add(self, host: Host, number: int) -> str | None:
        await _add_guest(host, f"bus{number}")
        await _add_device(host, number, f"bus{number}")
        return host.socket(f"bus{number}")


async def remove_device(host: Host, number: int) -> None:
    """Remove a device that was added."""
    await host.control.request("device.remove", name=f"echo{number}")


async def _add_guest(host: Host, name: str) -> None:
    await host.control.request("bus.add", name=name)
    await host.control.request("guest.add", guest={"name": name, "bus": name})


async def _add_device(host: Host, number: int, bus: str) -> None:
    await host.control.request(
        "device.add",
        name=f"echo{number}",
        class_name="echo",
        buses=[bus],
        attributes={},
    )


WAYS: tuple[Way, ...] = (OneBridge(), FunctionEach())


class TrialGuest:
    """A guest process (proxy.trials) and what it says."""

    def __init__(self, process: trio.Process, log: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._log = log
        self._rest = b""
        self._said: list[dict[str, Any]] = []

    async def tell(self, line: str = "") -> None:
        """Send a line: go on, or a function to attach to."""
        await self._stdin.send_all(line.encode() + b"\n")

    async def next(self) -> dict[str, Any]:
        """Give the next result. Raises SubjectError if it has ended."""
        while not self._said:
            chunk = await self._stdout.receive_some()
            if not chunk:
                raise SubjectError(f"the guest ended: {_last(self._log)}")
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._said += [msgspec.json.decode(line) for line in lines]
        return self._said.pop(0)

    async def until(self, trial: str) -> dict[str, Any]:
        """Skip what comes before a result of this name."""
        while (said := await self.next())["trial"] != trial:
            pass
        return said


@asynccontextmanager
async def trial_guest(
    way: Way, count: int, places: Sequence[str], *, loaded: bool
) -> AsyncIterator[TrialGuest]:
    """Run a guest at so many functions with so many devices behind them."""
    options = [*way.options, *(["--load"] if loaded else [])]
    words = ["--devices", str(count), *options, *places]
    with tempfile.NamedTemporaryFile(prefix="vbus-guest-") as log:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "proxy.trials", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield TrialGuest(process, Path(log.name))
        finally:
            await _end(process)
            assert process.stdin is not None
            assert process.stdout is not None
            await trio.aclose_forcefully(process.stdin)
            await trio.aclose_forcefully(process.stdout)
