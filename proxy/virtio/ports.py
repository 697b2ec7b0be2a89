"""virtio-console from the driver's side: one port or several (virtio 1.2, 5.3)."""

import struct
from dataclasses import dataclass
from typing import Final

import trio

from proxy.memory import DmaBuffer
from proxy.tasks import unwrapped
from proxy.virtio.device import VirtioDevice
from proxy.virtio.queue import RequestQueue, SlotPool, Virtqueue
from vbus.errors import InvalidError
from vbus.virtio.common import bits
from vbus.virtio.console import CONTROL_IN, CONTROL_OUT, MESSAGE, Event, Feature

WANTED: Final = bits(Feature.SIZE, Feature.MULTIPORT)
_CONFIG: Final = struct.Struct("<HHI")
_QUEUE_SIZE: Final = 16
_SLOT: Final = 4096
_MAX_PORTS: Final = 64
_TEXT: Final = 256
_NO_PORT: Final = 0xFFFF_FFFF


@dataclass(frozen=True)
class ConsoleStatistics:
    """Bytes over all ports, and ports that the device showed us."""

    ports: int
    rx_bytes: int
    tx_bytes: int


def _post(queue: Virtqueue, buffer: DmaBuffer) -> None:
    """Let the device fill a buffer, which is its own token."""
    queue.add([((), ((buffer.addr, buffer.size),), buffer)])


class ConsolePort:
    """One port: bytes both ways."""

    def __init__(self, number: int, rx: Virtqueue, tx: RequestQueue) -> None:
        self.number = number
        self.name = ""
        self.is_console = number == 0
        self.there = trio.Event()
        """Set once the device has shown the port to us."""
        self.rx_bytes = self.tx_bytes = 0
        self._rx = rx
        self._tx = tx
        self._slots: SlotPool | None = None

    def prepare(self, device: VirtioDevice) -> None:
        """Post the receive buffers."""
        self._slots = SlotPool(device.transport, 4, _SLOT)
        for _ in range(_QUEUE_SIZE):
            _post(self._rx, device.transport.allocate(_SLOT))

    def started(self) -> None:
        """The device may use the buffers."""
        self._rx.kick()

    async def receive(self) -> bytes:
        """Wait for bytes from the device. One task at a time."""
        while True:
            data = b""
            for buffer, written in self._rx.collect():
                data += buffer.view.read(0, written) if written else b""
                _post(self._rx, buffer)
            self._rx.kick()
            if data:
                self.rx_bytes += len(data)
                return data
            await self._rx.wait()

    async def send(self, data: bytes) -> None:
        """Send bytes; returns when the device has taken them."""
        if self._slots is None:
            raise InvalidError(f"port {self.number} is not started")
        for at in range(0, len(data), _SLOT):
            part = data[at : at + _SLOT]
            async with self._slots.slot() as slot:
                slot.view.write(0, part)
                await self._tx.ask(slot, [slot.at(0, len(part))], [])
            self.tx_bytes += len(part)

    async def run(self) -> None:
        """Take back what was sent, until cancelled."""
        await self._tx.run()


class Console:
    """A console that was brought up by `start`."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.size: tuple[int, int] | None = None
        """Columns and rows of port 0, if the device says so."""
        self.ports: list[ConsolePort] = []
        self.resized = trio.Event()
        self._control_in: Virtqueue | None = None
        self._control_out: RequestQueue | None = None
        self._slots: SlotPool | None = None

    async def start(self, *, packed: bool = False) -> None:
        """Bring the device up; `run` must run for anything to come or go."""
        device = self.device
        await device.negotiate(WANTED, packed=packed)
        multiport = device.has(Feature.MULTIPORT)
        count = 1
        if multiport or device.has(Feature.SIZE):
            count = await self._read_config()
        for number in range(count if multiport else 1):
            first = 2 * number + 2 if number else 0
            rx = await device.open_queue(first, _QUEUE_SIZE)
            tx = await device.open_queue(first + 1, _QUEUE_SIZE)
            self.ports.append(ConsolePort(number, rx, RequestQueue(tx)))
        if multiport:
            self._control_in = await device.open_queue(CONTROL_IN, _QUEUE_SIZE)
            out = await device.open_queue(CONTROL_OUT, _QUEUE_SIZE)
            self._control_out = RequestQueue(out)
            self._prepare_control()
        for port in self.ports:
            port.prepare(device)
        await device.ready()
        for port in self.ports:
            port.started()
        if not multiport:
            self.ports[0].there.set()

    async def _read_config(self) -> int:
        raw = await self.device.transport.read_config(0, _CONFIG.size)
        columns, rows, count = _CONFIG.unpack(raw)
        if self.device.has(Feature.SIZE):
            self._resize(columns, rows)
        return max(1, min(int(count), _MAX_PORTS))

    def _resize(self, columns: int, rows: int) -> None:
        self.size = columns, rows
        self.resized.set()
        self.resized = trio.Event()

    def _prepare_control(self) -> None:
        transport = self.device.transport
        self._slots = SlotPool(transport, _QUEUE_SIZE, _TEXT)
        assert self._control_in is not None
        for _ in range(_QUEUE_SIZE):
            _post(self._control_in, transport.allocate(_TEXT))

    async def run(self) -> None:
        """Talk to the device until cancelled, or it breaks or goes."""
        with unwrapped():
            async with trio.open_nursery() as nursery:
                for port in self.ports:
                    nursery.start_soon(port.run)
                nursery.start_soon(self._watch, nursery)
                if self._control_in is not None and self._control_out is not None:
                    nursery.start_soon(self._control_out.run)
                    nursery.start_soon(self._listen, self._control_in)
                    await self._tell(_NO_PORT, Event.DEVICE_READY, 1)

    async def _watch(self, nursery: trio.Nursery) -> None:
        await self.device.watch(lambda: nursery.start_soon(self._changed))

    async def _changed(self) -> None:
        if self.device.has(Feature.SIZE):
            await self._read_config()

    # Control messages (5.3.6.2)

    async def _tell(self, port: int, event: Event, value: int) -> None:
        assert self._control_out is not None
        assert self._slots is not None
        async with self._slots.slot() as slot:
            slot.view.write(0, MESSAGE.pack(port, event, value))
            await self._control_out.ask(slot, [slot.at(0, MESSAGE.size)], [])

    async def _listen(self, queue: Virtqueue) -> None:
        queue.kick()
        while True:
            for buffer, written in queue.collect():
                message = buffer.view.read(0, written) if written else b""
                _post(queue, buffer)
                if len(message) >= MESSAGE.size:
                    await self._hear(message)
            queue.kick()
            await queue.wait()

    async def _hear(self, message: bytes) -> None:
        number, event, value = MESSAGE.unpack_from(message)
        rest = message[MESSAGE.size :]
        if number >= len(self.ports):
            return
        port = self.ports[number]
        if event == Event.PORT_ADD:
            await self._tell(number, Event.PORT_READY, 1)
            await self._tell(number, Event.PORT_OPEN, 1)
            port.there.set()
        elif event == Event.CONSOLE_PORT:
            port.is_console = True
        elif event == Event.PORT_NAME and value:
            port.name = rest.rstrip(b"\0").decode(errors="replace")
        elif event == Event.RESIZE and number == 0 and len(rest) >= 4:
            rows, columns = struct.unpack_from("<HH", rest)
            self._resize(columns, rows)

    def statistics(self) -> ConsoleStatistics:
        """A snapshot of the counters."""
        return ConsoleStatistics(
            sum(port.there.is_set() for port in self.ports),
            sum(port.rx_bytes for port in self.ports),
            sum(port.tx_bytes for port in self.ports),
        )
