"""Drives a virtio console: each port is a pseudo-terminal of this machine."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import msgspec
import trio

from proxy.tasks import beside
from proxy.virtio.device import VirtioDevice
from proxy.virtio.ports import Console, ConsolePort, ConsoleStatistics
from vbus.pty import Pty


class ConsoleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a console can be told; `kernel` changes nothing."""

    packed: bool = False
    kernel: bool = False


@dataclass(frozen=True)
class ConsoleDriverStatistics:
    """The terminals by port: name (or number) and path; bytes both ways."""

    terminals: dict[str, str]
    dropped: int
    ports: ConsoleStatistics


class ConsoleDriver:
    """Drives one console."""

    def __init__(self, device: VirtioDevice, options: Mapping[str, object]) -> None:
        self.options = msgspec.convert(dict(options), ConsoleOptions, strict=False)
        self.console = Console(device)
        self._terminals: dict[int, Pty] = {}

    async def run(self, started: Callable[[str], None]) -> None:
        """Bring it up and move bytes."""
        await self.console.start(packed=self.options.packed)
        with ExitStack() as stack:
            for port in self.console.ports:
                terminal = stack.enter_context(closing(Pty()))
                self._terminals[port.number] = terminal
            async with beside(self.console.run), trio.open_nursery() as nursery:
                for port in self.console.ports:
                    terminal = self._terminals[port.number]
                    nursery.start_soon(_to_terminal, port, terminal)
                    nursery.start_soon(_from_terminal, port, terminal)
                paths = [str(each.path) for each in self._terminals.values()]
                started(", ".join(paths))

    def statistics(self) -> ConsoleDriverStatistics:
        """A snapshot of the counters."""
        return ConsoleDriverStatistics(
            {
                port.name or str(port.number): str(self._terminals[port.number].path)
                for port in self.console.ports
                if port.number in self._terminals
            },
            sum(each.dropped for each in self._terminals.values()),
            self.console.statistics(),
        )


async def _to_terminal(port: ConsolePort, terminal: Pty) -> None:
    while True:
        await terminal.send(await port.receive())


async def _from_terminal(port: ConsolePort, terminal: Pty) -> None:
    await port.there.wait()
    while True:
        await port.send(await terminal.receive())
