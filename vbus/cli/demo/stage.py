"""The demo's processes: the daemon, the guests, and short helpers in their networks.

Every process belongs to the stage's nursery and ends with it. A guest that is a virtual
machine is in `machine`.
"""

import json
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vbus.cli.demo.namespaces import in_network_of, new_network
from vbus.control.client import ControlClient
from vbus.errors import UnreachableError

READY_S = 15
_TRAFFIC = "vbus.cli.demo.traffic"
_VBUS = (sys.executable, "-m", "vbus")


class DemoError(Exception):
    """Something did not happen; the message says what."""


class Output:
    """The lines of a process that says no more until it is asked to."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def read_line(self) -> str:
        """Give its next line, "" at its end."""
        return await anext(self._lines, "")


async def lines_of(pieces: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    """Cut a stream into its lines."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()


class Place(ABC):
    """A network in which the traffic helper runs: the host's or a guest's."""

    @abstractmethod
    async def traffic(self, *words: str) -> str:
        """Run the helper to its end and give what it said."""

    @abstractmethod
    async def start_traffic(self, *words: str) -> Output:
        """Start the helper and let it run."""

    async def sink(self, port: str, word: str = "sink") -> Output:
        """Start a sink and wait until it listens; its output comes later."""
        output = await self.start_traffic(word, port)
        if await output.read_line() != "ready":
            raise DemoError("the sink does not listen")
        return output


class Host(Place):
    """The network of the daemon, or with `prefix` that of a process."""

    def __init__(self, stage: "Stage", prefix: Sequence[str] = ()) -> None:
        self._stage = stage
        self._prefix = prefix

    def _command(self, *words: str) -> list[str]:
        return [*self._prefix, sys.executable, "-m", _TRAFFIC, *words]

    async def traffic(self, *words: str) -> str:
        command = self._command(*words)
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        return done.stdout.decode()

    async def start_traffic(self, *words: str) -> Output:
        process = await self._stage.start(*self._command(*words), output=True)
        assert process.stdout is not None
        return Output(lines_of(process.stdout))


class Guest(Place):
    """A running `vbus guest run`, and what it has printed."""

    ready_s: float = READY_S

    def __init__(self, name: str) -> None:
        self.name = name
        self.function = ""
        """How it says that it reaches the bridge."""
        self.states: dict[str, str] = {}
        self.statistics: dict[str, Any] = {}
        self._news = trio.Condition()

    @abstractmethod
    async def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""

    @abstractmethod
    async def _signal(self, number: int) -> None: ...

    async def listen(self, lines: AsyncIterable[str]) -> None:
        """Take its lines until it ends."""
        async for line in lines:
            async with self._news:
                self._take(json.loads(line))
                self._news.notify_all()

    def _take(self, said: dict[str, Any]) -> None:
        if said["event"] == "device":
            self.states[said["name"]] = said["state"]
        elif said["event"] == "statistics":
            self.statistics = said
        elif said["event"] == "function":
            self.function = said["detail"]

    async def until(self, what: str, condition: Callable[[], object]) -> None:
        """Wait for something that it prints. Raises DemoError."""
        with trio.move_on_after(self.ready_s):
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
        await self._signal(signal.SIGUSR1)
        await self.until("statistics", lambda: self.statistics)
        return self.statistics


class ProcessGuest(Guest):
    """A guest that is a process of the host."""

    def __init__(self, name: str, process: trio.Process, stage: "Stage") -> None:
        super().__init__(name)
        self._process = process
        self._network = Host(stage, in_network_of(process.pid))

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def _signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def traffic(self, *words: str) -> str:
        return await self._network.traffic(*words)

    async def start_traffic(self, *words: str) -> Output:
        return await self._network.start_traffic(*words)


class Stage:
    """All processes of one demo, in `folder`."""

    def __init__(self, nursery: trio.Nursery, folder: Path, *, networks: bool) -> None:
        """With `networks` each guest has a network namespace of its own."""
        self.nursery = nursery
        self.folder = folder
        self.host = Host(self)
        self.log = folder / "log"
        self._networks = networks

    async def ask(self, op: str, **args: object) -> Any:
        """Ask the daemon one thing."""
        async with ControlClient(self.folder / "control.sock") as control:
            return await control.request(op, **args)

    async def serve(self, config: str) -> None:
        """Start the daemon and wait for it. Raises DemoError."""
        path = self.folder / "vbus.toml"
        path.write_text(config)
        process = await self.start(*_VBUS, "serve", "--config", str(path))
        with trio.move_on_after(READY_S):
            while process.returncode is None:
                try:
                    await self.ask("tree")
                except UnreachableError:
                    await trio.sleep(0.02)
                else:
                    return
        raise DemoError("the daemon does not start")

    def socket(self, guest: str) -> Path:
        return self.folder / "guests" / f"{guest}.sock"

    async def guest(self, name: str, *options: str) -> Guest:
        """Start a guest; what it prints is listened to."""
        socket = str(self.socket(name))
        command = [*_VBUS, "guest", "run", socket, "--json", *options]
        if self._networks:
            command = new_network(*command)
        process = await self.start(*command, output=True)
        assert process.stdout is not None
        guest = ProcessGuest(name, process, self)
        self.nursery.start_soon(guest.listen, lines_of(process.stdout))
        return guest

    async def start(self, *command: str, output: bool = False) -> trio.Process:
        """Start a process of the stage."""
        with self.log.open("ab") as log:
            run = partial(
                trio.run_process,
                list(command),
                stdout=subprocess.PIPE if output else None,
                stderr=log,
                check=False,
                deliver_cancel=_end,
            )
            process: trio.Process = await self.nursery.start(run)
        return process


async def _end(process: trio.Process) -> None:
    """Ask a process to end; after a while insist. The stage waits for it."""
    process.terminate()
    with trio.CancelScope(shield=True):
        await trio.sleep(5)
        process.kill()
