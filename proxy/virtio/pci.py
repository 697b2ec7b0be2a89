"""A virtio device that is a PCI function of its own, from the driver's side.

`PciTransport` is what all register layouts share; `ModernTransport` is virtio 1.x,
whose capabilities say where its registers are (virtio 1.2, 4.1.4). The function may be
a vfio-user server's, or this machine's own.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

import trio

from proxy.device import Wake
from proxy.memory import DmaBuffer
from proxy.pci import Interrupts, PciFunction
from proxy.tasks import beside
from proxy.virtio.ring import RingLayout
from proxy.virtio.transport import Identity
from vbus.errors import InvalidError, NotFoundError, ProtocolError, VbusError
from vbus.pci.constants import CONFIG_SIZE, Capability, Command, Irq, Offset

VENDOR: Final = 0x1AF4
MODERN_BASE: Final = 0x1040
NO_VECTOR: Final = 0xFFFF
_PAGE: Final = 4096
_TRIES: Final = 100
_RESET_S: Final = 1.0

COMMON, NOTIFY, ISR, DEVICE, PCI_ACCESS = range(1, 6)
_CAPABILITY: Final = struct.Struct("<BBBHII")
_HEAD: Final = 3


class Place(NamedTuple):
    """Where a set of registers is."""

    bar: int
    offset: int
    length: int


@dataclass
class PciQueueSignal:
    """A register that kicks a queue, and the wake of its vector."""

    kick_it: Callable[[], None]
    wake: Wake

    def kick(self) -> None:
        self.kick_it()

    def rearm(self) -> bool:
        return False

    async def wait(self) -> None:
        await self.wake.wait()


class PciTransport(ABC):
    """A device behind PCI registers (a Transport); subclasses know which.

    MSI-X vector 0 is the configuration's; each queue has the one behind its number,
    as far as there are vectors.
    """

    def __init__(self, function: PciFunction, name: str) -> None:
        self.name = name
        self.function = function
        self.space = function.memory.space
        self.config_changed = Wake()
        self.vectors = 0
        self._wakes: dict[int, Wake] = {}
        self._buffers: list[DmaBuffer] = []

    # Life

    async def start(self) -> Interrupts:
        """Let the function decode, reach memory and send messages."""
        bits = Command.IO | Command.MEMORY | Command.BUS_MASTER
        await self.function.set_command(bits, on=True)
        self.vectors = self.function.interrupt_vectors(Irq.MSIX)
        return await self.function.enable_interrupts(Irq.MSIX, self.vectors)

    async def run(self, interrupts: Interrupts) -> None:
        """Hand interrupts on, until cancelled or the function is gone."""
        try:
            while True:
                for vector in await interrupts.wait():
                    self._wake(vector)
        except VbusError as error:
            for wake in (self.config_changed, *self._wakes.values()):
                wake.fail(error)

    def close(self) -> None:
        """Free all memory; the device was reset, or is gone."""
        while self._buffers:
            self._buffers.pop().close()

    def _wake(self, vector: int) -> None:
        if vector == 0:
            self.config_changed.ring()
        elif vector - 1 in self._wakes:
            self._wakes[vector - 1].ring()

    def vector_of(self, index: int) -> int:
        """Give a queue's vector."""
        return index + 1 if index + 1 < self.vectors else NO_VECTOR

    # Registers

    async def get(self, place: Place, offset: int, size: int) -> int:
        """Read a register."""
        data = await self.function.bar_read(place.bar, place.offset + offset, size)
        return int.from_bytes(data, "little")

    async def put(self, place: Place, offset: int, size: int, value: int) -> None:
        """Write a register."""
        data = value.to_bytes(size, "little")
        await self.function.bar_write(place.bar, place.offset + offset, data)

    # Transport, as far as it is the same everywhere

    def config_seen(self) -> None:  # noqa: B027
        """Every change rings."""

    async def set_status(self, value: int) -> int:
        await self.write_status(value)
        for _ in range(_TRIES):
            status = await self.status()
            if value or not status:  # a reset takes as long as it takes (4.1.4.3.2)
                return status
            await trio.sleep(0.001)
        return status

    async def queue_memory(self, index: int, size: int) -> DmaBuffer:
        return self.allocate(size, alignment=_PAGE)

    def allocate(self, size: int, *, alignment: int = 64) -> DmaBuffer:
        buffer = self.function.memory.allocate(size, alignment=alignment)
        self._buffers.append(buffer)
        return buffer

    async def enable_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> PciQueueSignal:
        wake = self._wakes[index] = Wake()
        kick = await self.place_queue(index, entries, layout)
        return PciQueueSignal(kick, wake)

    # What a layout adds

    @abstractmethod
    async def identify(self) -> Identity:
        """Say what the device is."""

    @abstractmethod
    async def offered(self) -> int:
        """Give the features that the device offers."""

    @abstractmethod
    async def accept(self, features: int) -> None:
        """Tell the device which of them we take."""

    @abstractmethod
    async def status(self) -> int:
        """Read the status."""

    @abstractmethod
    async def write_status(self, value: int) -> None:
        """Write the status."""

    @abstractmethod
    async def read_config(self, offset: int, size: int) -> bytes:
        """Read configuration, of one moment."""

    @abstractmethod
    async def write_config(self, offset: int, data: bytes) -> None:
        """Write configuration."""

    @abstractmethod
    async def queue_limit(self, index: int) -> int:
        """Say how many entries a queue can have."""

    @abstractmethod
    async def place_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> Callable[[], None]:
        """Let the device use a ring; give what kicks it."""


class Common(NamedTuple):
    """Offset and size of the common registers (4.1.4.3) that we use."""

    at: int
    size: int


DEVICE_FEATURE_SELECT, DEVICE_FEATURE = Common(0, 4), Common(4, 4)
DRIVER_FEATURE_SELECT, DRIVER_FEATURE = Common(8, 4), Common(12, 4)
CONFIG_VECTOR, QUEUES = Common(16, 2), Common(18, 2)
STATUS, GENERATION = Common(20, 1), Common(21, 1)
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR = Common(22, 2), Common(24, 2), Common(26, 2)
QUEUE_ENABLE, QUEUE_NOTIFY_OFF = Common(28, 2), Common(30, 2)
QUEUE_ADDRESSES = 32


class ModernTransport(PciTransport):
    """virtio 1.x."""

    def __init__(
        self,
        function: PciFunction,
        name: str,
        places: dict[int, Place],
        multiplier: int,
    ) -> None:
        super().__init__(function, name)
        self.places = places
        self._multiplier = multiplier

    @classmethod
    async def find(cls, function: PciFunction, name: str = "virtio") -> Self:
        """Read the capabilities. Raises InvalidError: not a modern virtio device."""
        places: dict[int, Place] = {}
        multiplier = 0
        for at in await capabilities(function, Capability.VENDOR):
            raw = await function.config_read(at + _HEAD, _CAPABILITY.size)
            kind, bar, _, _, offset, length = _CAPABILITY.unpack(raw)
            if kind in places:
                continue  # the first one is the one to use (4.1.4.1)
            places[kind] = Place(bar, offset, length)
            if kind == NOTIFY:
                raw = await function.config_read(at + _HEAD + _CAPABILITY.size, 4)
                multiplier = int.from_bytes(raw, "little")
        if not {COMMON, NOTIFY, ISR} <= places.keys():
            raise InvalidError(f"{name} is no virtio 1.x function")
        return cls(function, name, places, multiplier)

    async def common(self, register: Common) -> int:
        """Read a common register."""
        return await self.get(self.places[COMMON], *register)

    async def set_common(self, register: Common, value: int) -> None:
        """Write a common register."""
        await self.put(self.places[COMMON], *register, value)

    async def identify(self) -> Identity:
        kind = await self.function.config_read_u16(Offset.DEVICE_ID) - MODERN_BASE
        if kind < 0:  # transitional (4.1.2.1)
            kind = await self.function.config_read_u16(Offset.SUBSYSTEM_ID)
        queues = await self.common(QUEUES)
        config = self.places.get(DEVICE, Place(0, 0, 0))
        return Identity(kind, queues, config.length)

    async def offered(self) -> int:
        word = 0
        for select in range(2):
            await self.set_common(DEVICE_FEATURE_SELECT, select)
            word |= await self.common(DEVICE_FEATURE) << 32 * select
        return word

    async def accept(self, features: int) -> None:
        for select in range(2):
            await self.set_common(DRIVER_FEATURE_SELECT, select)
            word = features >> 32 * select & 0xFFFF_FFFF
            await self.set_common(DRIVER_FEATURE, word)
        # A reset has taken the vector away.
        await self.set_common(CONFIG_VECTOR, 0)

    async def status(self) -> int:
        return await self.common(STATUS)

    async def write_status(self, value: int) -> None:
        await self.set_common(STATUS, value)

    async def read_config(self, offset: int, size: int) -> bytes:
        """Read until nothing changed meanwhile (2.5.1)."""
        place = self._config
        for _ in range(_TRIES):
            before = await self.common(GENERATION)
            at = place.offset + offset
            data = await self.function.bar_read(place.bar, at, size)
            if await self.common(GENERATION) == before:
                return data
        raise ProtocolError(f"the configuration of {self.name} never stands still")

    async def write_config(self, offset: int, data: bytes) -> None:
        place = self._config
        await self.function.bar_write(place.bar, place.offset + offset, data)

    @property
    def _config(self) -> Place:
        try:
            return self.places[DEVICE]
        except KeyError:
            raise NotFoundError(f"{self.name} has no configuration") from None

    async def queue_limit(self, index: int) -> int:
        await self.set_common(QUEUE_SELECT, index)
        return await self.common(QUEUE_SIZE)

    async def place_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> Callable[[], None]:
        await self.set_common(QUEUE_SELECT, index)
        await self.set_common(QUEUE_SIZE, entries)
        await self.set_common(QUEUE_VECTOR, self.vector_of(index))
        for n, address in enumerate(layout):
            for half in range(2):
                register = Common(QUEUE_ADDRESSES + 8 * n + 4 * half, 4)
                await self.set_common(register, address >> 32 * half & 0xFFFF_FFFF)
        await self.set_common(QUEUE_ENABLE, 1)
        notify = self.places[NOTIFY]
        slot = await self.common(QUEUE_NOTIFY_OFF) * self._multiplier
        number = index.to_bytes(2, "little")
        return lambda: self.function.post_write(
            notify.bar, notify.offset + slot, number
        )


async def capabilities(function: PciFunction, wanted: int) -> list[int]:
    """Find the capabilities of one kind. Raises ProtocolError: they do not end."""
    found: list[int] = []
    at = (await function.config_read(Offset.CAPABILITIES, 1))[0] & ~3
    for _ in range(CONFIG_SIZE // 4):
        if not at:
            return found
        ident, following = await function.config_read(at, 2)
        if ident == wanted:
            found.append(at)
        at = following & ~3
    raise ProtocolError("the capabilities of the function do not end")


@asynccontextmanager
async def opened(transport: PciTransport) -> AsyncIterator[PciTransport]:
    """Use a device's function; on the way out the device is reset."""
    interrupts = await transport.start()
    try:
        async with beside(lambda: transport.run(interrupts)):
            try:
                yield transport
            finally:
                with trio.move_on_after(_RESET_S, shield=True), suppress(VbusError):
                    await transport.set_status(0)
    finally:
        transport.close()
