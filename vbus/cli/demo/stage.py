"""The demo's processes: the daemon, the guests, and short helpers in their networks.

Every process belongs to the stage's nursery and ends with it.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vbus.cli.demo.namespaces import in_network_of, new_network
from vbus.control.client import ControlClient
from vbus.errors import UnreachableError

_READY_S = 15
_TRAFFIC = (sys.executable, "-m", "vbus.cli.demo.traffic")
_VBUS = (sys.executable, "-m", "vbus")


class DemoError(Exception):
    """Something did not happen; the message says what."""


class Guest:
    """A running `vbus guest run`, and what it has printed."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.process = process
        self.states: dict[str, str] = {}
        self.statistics: dict[str, Any] = {}
        self._news = trio.Condition()

    async def listen(self) -> None:
        """Take its lines until it ends."""
        assert self.process.stdout is not None
        rest = b""
        async for chunk in self.process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            async with self._news:
                for line in lines:
                    self._take(json.loads(line))
                self._news.notify_all()

    def _take(self, said: dict[str, Any]) -> None:
        if said["event"] == "device":
            self.states[said["name"]] = said["state"]
        elif said["event"] == "statistics":
            self.statistics = said

    async def until(self, what: str, condition: Callable[[], object]) -> None:
        """Wait for something that it prints. Raises DemoError."""
        with trio.move_on_after(_READY_S):
            async with self._news:
                while not condition():
                    await self._news.wait()
            return
        raise DemoError(f"{self.name}: {what} did not happen: {self.states}")

    async def device(self, device: str, state: str) -> None:
        """Wait until a device's driver is in a state."""
        await self.until(f"{device} {state}", lambda: self.states.get(device) == state)

    async def ask_statistics(self) -> dict[str, Any]:
        """Give what it counts now."""
        self.statistics = {}
        self.process.send_signal(signal.SIGUSR1)
        await self.until("statistics", lambda: self.statistics)
        return self.statistics


class Stage:
    """All processes of one demo, in `folder`."""

    def __init__(self, nursery: trio.Nursery, folder: Path, *, networks: bool) -> None:
        """With `networks` each guest has a network namespace of its own."""
        self._nursery = nursery
        self._folder = folder
        self._networks = networks
        self.log = folder / "log"

    def client(self) -> ControlClient:
        return ControlClient(self._folder / "control.sock")

    async def ask(self, op: str, **args: object) -> Any:
        """Ask the daemon one thing."""
        async with self.client() as control:
            return await control.request(op, **args)

    async def serve(self, config: str) -> None:
        """Start the daemon and wait for it. Raises DemoError."""
        path = self._folder / "vbus.toml"
        path.write_text(config)
        process = await self._start(*_VBUS, "serve", "--config", str(path))
        with trio.move_on_after(_READY_S):
            while process.returncode is None:
                try:
                    await self.ask("tree")
                except UnreachableError:
                    await trio.sleep(0.02)
                else:
                    return
        raise DemoError("the daemon does not start")

    async def guest(self, name: str, *options: str) -> Guest:
        """Start a guest; what it prints is listened to."""
        socket = self._folder / "guests" / f"{name}.sock"
        command = [*_VBUS, "guest", "run", str(socket), "--json", *options]
        if self._networks:
            command = new_network(*command)
        guest = Guest(name, await self._start(*command, stdout=subprocess.PIPE))
        self._nursery.start_soon(guest.listen)
        return guest

    async def traffic(self, place: Guest | None, *words: str) -> str:
        """Run a traffic helper in the network of a guest or the host to its end."""
        done = await trio.run_process(
            self._in(place, *words), capture_stdout=True, capture_stderr=True
        )
        return done.stdout.decode()

    async def sink(self, place: Guest | None, port: str) -> trio.Process:
        """Start a sink and wait until it listens; its output comes later."""
        process = await self._start(
            *self._in(place, "sink", port), stdout=subprocess.PIPE
        )
        if await read_line(process) != b"ready":
            raise DemoError("the sink does not listen")
        return process

    def _in(self, place: Guest | None, *words: str) -> list[str]:
        command = [*_TRAFFIC, *words]
        return command if place is None else in_network_of(place.process.pid, *command)

    async def _start(self, *command: str, stdout: int | None = None) -> trio.Process:
        with self.log.open("ab") as log:
            run = partial(
                trio.run_process,
                list(command),
                stdout=stdout,
                stderr=log,
                check=False,
                deliver_cancel=_end,
            )
            process: trio.Process = await self._nursery.start(run)
        return process


async def read_line(process: trio.Process) -> bytes:
    """Give the next line of a process that says no more until it is asked to."""
    assert process.stdout is not None
    said = b""
    while not said.endswith(b"\n"):
        chunk = await process.stdout.receive_some()
        if not chunk:
            break
        said += chunk
    return said.rstrip()


async def _end(process: trio.Process) -> None:
    """Ask a process to end; after a while insist. The stage waits for it."""
    process.terminate()
    with trio.CancelScope(shield=True):
        await trio.sleep(5)
        process.kill()
