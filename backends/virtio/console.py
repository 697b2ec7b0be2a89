"""virtio-console (virtio 1.2, section 5.3): ports between virtqueues and Channels.

Queues: receive and transmit of port 0, the control queues, receive and transmit of
port 1, ...; without MULTIPORT there is only port 0.
"""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from backends.venet.flag import Flag
from backends.virtio.channels import Channel
from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId, bits
from backends.virtio.device import (
    Chain,
    DeviceQueue,
    LiveRing,
    MalformedError,
    VirtioDevice,
)
from vbus.errors import InvalidError
from vbus.virtio.console import CONTROL_IN, CONTROL_OUT, MESSAGE, Event, Feature

_CHUNK: Final = 64 << 10
MAX_PORTS: Final = 31


FIELDS: Final = (
    Field("cols", 0, "H", changes=True),
    Field("rows", 2, "H", changes=True),
    Field("max_nr_ports", 4, "I"),
    Field("emerg_wr", 8, "I", written=Written.ANY),
)


@dataclass
class Port:
    """One port: what the driver reads and writes, and where that goes."""

    channel: Channel
    name: str = ""
    console: bool = False
    """A terminal rather than a stream of bytes, to a driver with MULTIPORT."""


@dataclass(frozen=True)
class ConsoleStatistics:
    """Bytes to (rx) and from (tx) the driver; `dropped` nobody was there for.

    `bad_messages` named no port or event.
    """

    rx_bytes: int
    tx_bytes: int
    dropped: int
    emergency_bytes: int
    bad_messages: int


def _port_of(queue: int) -> int:
    return 0 if queue < CONTROL_IN else queue // 2 - 1


class VirtioConsole(VirtioDevice):
    """A console, or several ports. The channels stay the caller's to close."""

    device_id = DeviceId.CONSOLE

    def __init__(
        self,
        ports: Sequence[Port],
        *,
        size: tuple[int, int] = (80, 25),
        queue_size: int = 64,
        latch: bool = False,
    ) -> None:
        """`size`: columns and rows. Raises InvalidError."""
        if not 1 <= len(ports) <= MAX_PORTS:
            raise InvalidError(f"{len(ports)} ports are not between 1 and {MAX_PORTS}")
        self.ports = tuple(ports)
        self._open = [Flag() for _ in ports]
        self._pending = [b"" for _ in ports]
        self._outbox: deque[bytes] = deque()
        self._mail = Flag()
        self._counts = dict.fromkeys(ConsoleStatistics.__dataclass_fields__, 0)
        several = any(port.name for port in ports) or len(ports) > 1
        features = bits(Feature.SIZE, Feature.EMERG_WRITE)
        if several:
            features |= bits(Feature.MULTIPORT)
        super().__init__(
            [queue_size] * (2 * len(ports) + 2 * several),
            features=features,
            config=ConfigSpace(FIELDS, latch=latch),
        )
        self.change_config(cols=size[0], rows=size[1], max_nr_ports=len(ports))

    @property
    def multiport(self) -> bool:
        """Does the driver know of more than one port?"""
        return self.has(Feature.MULTIPORT)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the driver the size of port 0's terminal."""
        self.change_config(cols=columns, rows=rows)
        if self.multiport:
            self._send_size()

    def config_written(self, name: str) -> None:
        """Emergency write (5.3.4): one character, at any time, before DRIVER_OK too."""
        character = bytes([self.config.number("emerg_wr") & 0xFF])
        self.ports[0].channel.send_now(character)
        self._counts["emergency_bytes"] += 1

    def was_reset(self) -> None:
        for flag in self._open:
            flag.set(False)
        self._pending = [b"" for _ in self.ports]
        self._outbox.clear()
        self._mail.set(False)

    def started(self) -> None:
        self._open[0].set(not self.multiport)

    # Queues

    async def drive(self, queue: DeviceQueue, ring: LiveRing) -> None:
        index = queue.index
        if index >= CONTROL_IN and not self.multiport:
            await trio.sleep_forever()
        elif index == CONTROL_IN:
            await self._tell(queue, ring)
        elif index % 2 == 0:
            await self._input(queue, ring, _port_of(index))
        else:
            await super().drive(queue, ring)

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        for chain in chains:
            if queue.index == CONTROL_OUT:
                self._hear(chain)
                await trio.lowlevel.checkpoint()
            else:
                await self._output(ring, chain, self.ports[_port_of(queue.index)])
            self.complete(queue.index, ring, chain, 0)

    async def _output(self, ring: LiveRing, chain: Chain, port: Port) -> None:
        await trio.lowlevel.checkpoint()
        for at in range(0, chain.readable, _CHUNK):
            if not ring.alive:
                return
            data = chain.read(at, min(_CHUNK, chain.readable - at))
            await port.channel.send(data)
            self._counts["tx_bytes"] += len(data)

    async def _input(self, queue: DeviceQueue, ring: LiveRing, port: int) -> None:
        while True:
            await self._open[port].wait(True)
            if not self._pending[port]:
                self._pending[port] = await self.ports[port].channel.receive()
            chain = await self._next(ring)
            data = self._pending[port][: chain.writable]
            chain.write(0, data)
            self._pending[port] = self._pending[port][len(data) :]
            self._counts["rx_bytes"] += len(data)
            self.complete(queue.index, ring, chain, len(data))

    async def _next(self, ring: LiveRing) -> Chain:
        """Wait for a buffer of the driver."""
        while True:
            for chain in ring.pop(1):
                if chain.readable or not chain.writable:
                    raise MalformedError("an input buffer that is not device-writable")
                return chain
            await ring.wait()

    # Control (5.3.6.2)

    def _hear(self, chain: Chain) -> None:
        if chain.readable < MESSAGE.size:
            raise MalformedError("a control message that is too short")
        number, event, value = MESSAGE.unpack(chain.read(0, MESSAGE.size))
        if event == Event.DEVICE_READY:
            for each in range(len(self.ports)) if value else ():
                self._send(each, Event.PORT_ADD, 1)
        elif number < len(self.ports) and event == Event.PORT_READY:
            if value:
                self._introduce(number)
        elif number < len(self.ports) and event == Event.PORT_OPEN:
            self._open[number].set(bool(value))
        else:
            self._counts["bad_messages"] += 1

    def _introduce(self, number: int) -> None:
        port = self.ports[number]
        if port.console:
            self._send(number, Event.CONSOLE_PORT, 1)
            if number == 0:
                self._send_size()
        if port.name:
            self._send(number, Event.PORT_NAME, 1, port.name.encode())
        self._send(number, Event.PORT_OPEN, 1)

    def _send_size(self) -> None:
        # Rows first: 5.3.6.2 draws columns first, but Linux has read rows first ever
        # since it knows this message (2010), and it is the driver there is.
        size = struct.pack(
            "<HH", self.config.number("rows"), self.config.number("cols")
        )
        self._send(0, Event.RESIZE, 1, size)

    def _send(self, port: int, event: Event, value: int, data: bytes = b"") -> None:
        # A driver that asks without taking answers must not fill our memory.
        if len(self._outbox) < 8 * len(self.ports) + 64:
            self._outbox.append(MESSAGE.pack(port, event, value) + data)
            self._mail.set(True)

    async def _tell(self, queue: DeviceQueue, ring: LiveRing) -> None:
        while True:
            await self._mail.wait(True)
            chain = await self._next(ring)
            message = self._outbox.popleft()[: chain.writable]
            self._mail.set(bool(self._outbox))
            chain.write(0, message)
            self.complete(queue.index, ring, chain, len(message))

    def io_statistics(self) -> ConsoleStatistics:
        """A snapshot of the counters."""
        dropped = sum(port.channel.dropped for port in self.ports)
        return ConsoleStatistics(**(self._counts | {"dropped": dropped}))
