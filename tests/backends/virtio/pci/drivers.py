"""Drivers for every register layout, by the words of the requirement rows alone.

They share the frame of `proxy.virtio.pci` and none of the tables they are to test.
"""

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import trio

from backends.virtio.device import VirtioDevice as Model
from backends.virtio.pci import VirtioFunction, function
from proxy.memory import DmaMemory
from proxy.pci import Interrupts
from proxy.vfio_user import VfioUserClient, connect
from proxy.virtio.device import VirtioDevice
from proxy.virtio.pci import ModernTransport, PciTransport, Place, capabilities, opened
from proxy.virtio.ring import RingLayout
from proxy.virtio.transport import Identity
from vbus.errors import InvalidError
from vbus.pci.constants import Capability, Irq, Offset
from vbus.vfio_user import wire
from vbus.vfio_user.server import VfioUserServer
from vbus.vfio_user.wire import Command, IrqSetFlag
from vbus.virtio.common import Ring, Status, bits

PORTS = Place(0, 0, 256)
PAGE = 4096
SEPARATE_CONFIG = 31


class LegacyDriver(PciTransport):
    """R20: everything in BAR 0."""

    features = 0

    @property
    def config_at(self) -> int:
        return 24 if self.vectors else 20

    async def identify(self) -> Identity:
        kind = await self.function.config_read_u16(Offset.SUBSYSTEM_ID)
        queues = 0
        while await self.queue_limit(queues):
            queues += 1
        return Identity(kind, queues, 256 - self.config_at)

    async def offered(self) -> int:
        return await self.get(PORTS, 0, 4)

    async def accept(self, features: int) -> None:
        await self.put(PORTS, 4, 4, features & 0xFFFF_FFFF)
        if self.vectors:
            await self.put(PORTS, 20, 2, 0)

    async def status(self) -> int:
        return await self.get(PORTS, 18, 1)

    async def write_status(self, value: int) -> None:
        await self.put(PORTS, 18, 1, value)

    async def read_config(self, offset: int, size: int) -> bytes:
        return await self.function.bar_read(0, self.config_at + offset, size)

    async def write_config(self, offset: int, data: bytes) -> None:
        await self.function.bar_write(0, self.config_at + offset, data)

    async def queue_limit(self, index: int) -> int:
        await self.put(PORTS, 14, 2, index)
        return await self.get(PORTS, 12, 2)

    async def place_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> Callable[[], None]:
        await self.put(PORTS, 14, 2, index)
        assert entries == await self.get(PORTS, 12, 2), "the device says the size"
        if self.vectors:
            await self.put(PORTS, 22, 2, self.vector_of(index))
        await self.put(PORTS, 8, 4, layout.desc // PAGE)
        return lambda: self.notify(index)

    def notify(self, index: int) -> None:
        self.function.post_write(0, 16, index.to_bytes(2, "little"))


class LineDriver(LegacyDriver):
    """R20 without MSI-X: one line, and the ISR says what for."""

    async def start(self) -> Interrupts:
        bits = await self.function.config_read_u16(Offset.COMMAND)
        await self.function.config_write(
            Offset.COMMAND, (bits | 0b101).to_bytes(2, "little")
        )
        interrupts = Interrupts(1)
        flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
        assert isinstance(self.function, VfioUserClient)
        await self.function._request(
            Command.DEVICE_SET_IRQS,
            wire.SetIrqs(flags, Irq.INTX, 0, 1).pack(),
            [interrupts.doorbells[0].fileno()],
        )
        self.isrs: list[int] = []
        return interrupts

    async def run(self, interrupts: Interrupts) -> None:
        with closing(interrupts):
            await self._serve(interrupts)

    async def _serve(self, interrupts: Interrupts) -> None:
        while True:
            await interrupts.wait()
            isr = await self.get(PORTS, 19, 1)
            self.isrs.append(isr)
            if isr & 1:
                for wake in self._wakes.values():
                    wake.ring()
            if isr & 2:
                self.config_changed.ring()


class ProposedDriver(LegacyDriver):
    """R21 and R23: the new registers; notifications stay in BAR 0."""

    def __init__(
        self, function: VfioUserClient, name: str, common: Place, config: Place
    ) -> None:
        super().__init__(function, name)
        self.common = common
        self.config = config

    async def identify(self) -> Identity:
        kind = await self.function.config_read_u16(Offset.SUBSYSTEM_ID)
        queues = 0
        while await self._address(queues) != (1 << 64) - 1:
            queues += 1
        return Identity(kind, queues, self.config.length)

    async def _address(self, index: int) -> int:
        await self.put(self.common, 24, 2, index)
        low = await self.get(self.common, 32, 4)
        return low | await self.get(self.common, 36, 4) << 32

    async def offered(self) -> int:
        word = 0
        for select in range(2):
            await self.put(self.common, 0, 4, select)
            word |= await self.get(self.common, 4, 4) << 32 * select
        return word

    async def accept(self, features: int) -> None:
        for select in range(2):
            await self.put(self.common, 8, 4, select)
            await self.put(self.common, 12, 4, features >> 32 * select & 0xFFFF_FFFF)
        await self.put(self.common, 20, 2, 0)

    async def status(self) -> int:
        return await self.get(self.common, 22, 1)

    async def write_status(self, value: int) -> None:
        await self.put(self.common, 22, 1, value)

    async def read_config(self, offset: int, size: int) -> bytes:
        while True:
            before = await self.get(self.common, 16, 4)
            at = self.config.offset + offset
            data = await self.function.bar_read(self.config.bar, at, size)
            if await self.get(self.common, 16, 4) == before:
                return data

    async def write_config(self, offset: int, data: bytes) -> None:
        at = self.config.offset + offset
        await self.function.bar_write(self.config.bar, at, data)

    async def commit(self) -> None:
        await self.put(self.common, 16, 4, 1)

    async def queue_limit(self, index: int) -> int:
        await self.put(self.common, 24, 2, index)
        return await self.get(self.common, 28, 2)

    async def place_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> Callable[[], None]:
        await self.put(self.common, 24, 2, index)
        await self.put(self.common, 26, 2, PAGE)
        await self.put(self.common, 28, 2, entries)
        await self.put(self.common, 30, 2, self.vector_of(index))
        await self.put(self.common, 32, 4, layout.desc & 0xFFFF_FFFF)
        await self.put(self.common, 36, 4, layout.desc >> 32)
        assert await self._address(index) == layout.desc
        return lambda: self.notify(index)


class CommandDriver(ProposedDriver):
    """R21 with the command register of R25 in BAR 2: offset, length, command, data."""

    async def read_config(self, offset: int, size: int) -> bytes:
        await self._command(1, offset, size)
        return await self.function.bar_read(2, 12, size)

    async def write_config(self, offset: int, data: bytes) -> None:
        await self.function.bar_write(2, 12, data)
        await self._command(2, offset, len(data))

    async def _command(self, command: int, offset: int, size: int) -> None:
        for at, value in ((0, offset), (4, size), (8, command)):
            await self.put(self.config, at, 4, value)


class MirroredDriver(LegacyDriver):
    """R22 by BAR 1, where the registers never are covered; BAR 2 is configuration."""

    mirror = Place(1, 0, 36)

    async def identify(self) -> Identity:
        found = await super().identify()
        return found._replace(config_size=PAGE)

    async def offered(self) -> int:
        word = 0
        for select in range(2):
            await self.put(self.mirror, 24, 4, select)
            word |= await self.get(self.mirror, 0, 4) << 32 * select
        return word

    async def accept(self, features: int) -> None:
        features |= 1 << SEPARATE_CONFIG
        for select in range(2):
            await self.put(self.mirror, 28, 4, select)
            await self.put(self.mirror, 4, 4, features >> 32 * select & 0xFFFF_FFFF)
        await self.put(self.mirror, 20, 2, 0)

    async def status(self) -> int:
        return await self.get(self.mirror, 18, 1)

    async def write_status(self, value: int) -> None:
        await self.put(self.mirror, 18, 1, value)

    async def read_config(self, offset: int, size: int) -> bytes:
        return await self.function.bar_read(2, offset, size)

    async def write_config(self, offset: int, data: bytes) -> None:
        await self.function.bar_write(2, offset, data)

    async def queue_limit(self, index: int) -> int:
        await self.put(self.mirror, 14, 2, index)
        return await self.get(self.mirror, 12, 2)

    async def place_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> Callable[[], None]:
        await self.put(self.mirror, 14, 2, index)
        await self.put(self.mirror, 22, 2, self.vector_of(index))
        page = layout.desc // PAGE
        await self.put(self.mirror, 32, 4, page >> 32)
        await self.put(self.mirror, 8, 4, page & 0xFFFF_FFFF)
        number = index.to_bytes(2, "little")
        return lambda: self.function.post_write(1, 16, number)


class LegacyDevice(VirtioDevice):
    """Brings a device up as before virtio 1.0: no FEATURES_OK, 32 bits of features."""

    async def negotiate(self, wanted: int, *, packed: bool = False) -> None:
        transport = self.transport
        assert await transport.set_status(0) == 0
        await transport.set_status(Status.ACKNOWLEDGE)
        await transport.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        wanted |= bits(Ring.INDIRECT_DESC, Ring.EVENT_IDX)
        self.features = await transport.offered() & wanted
        await transport.accept(self.features)

    async def ready(self) -> None:
        live = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK
        self._check(await self.transport.set_status(live))


# Finding the registers


async def vendor_bytes(client: VfioUserClient, size: int) -> tuple[int, bytes]:
    """Give the length and the first bytes after it, of the first such capability."""
    for at in await capabilities(client, Capability.VENDOR):
        raw = await client.config_read(at + 2, 1 + size)
        return raw[0], raw[1:]
    raise AssertionError("no vendor capability")


async def find_offsets(client: VfioUserClient, name: str) -> ProposedDriver:
    """R23 (a): bit 31 present, 26-24 BAR, 23-0 offset."""
    length, raw = await vendor_bytes(client, 17)
    assert length == 20
    words = struct.unpack_from("<4I", raw, 1)
    legacy, common, config, isr = (
        Place(word >> 24 & 7, word & 0xFF_FFFF, PAGE) for word in words
    )
    assert all(word >> 31 for word in words)
    assert (legacy.bar, legacy.offset) == (0, 0)
    assert (isr.bar, isr.offset) == (0, 19), "the ISR points into the legacy area"
    return ProposedDriver(client, name, common, config)


async def find_table(client: VfioUserClient, name: str) -> ProposedDriver:
    """R23 (b): the capability names the BAR, the table is at its begin."""
    length, raw = await vendor_bytes(client, 1)
    assert length == 4
    bar = raw[0]
    table = await client.bar_read(bar, 0, 12)
    count, common, config = struct.unpack("<III", table)
    assert count == 2
    return ProposedDriver(client, name, Place(bar, common, 40), Place(bar, config, 256))


async def find_draft(client: VfioUserClient, name: str) -> ModernTransport:
    """R24's draft: cap_len, cfg_type, bar, pad, offset 16, length 32."""
    places = {}
    for at in await capabilities(client, Capability.VENDOR):
        raw = await client.config_read(at + 2, 10)
        length, kind, bar, _, offset, size = struct.unpack("<BBBBHI", raw)
        assert length == 12
        places[kind] = Place(bar, offset, size)
    assert places.keys() == {1, 2, 3, 4}
    return ModernTransport(client, name, places, 4)


async def driver_for(client: VfioUserClient, layout: str) -> PciTransport:
    common, config = Place(1, 0, 40), Place(2, 0, PAGE)
    match layout:
        case "modern" | "transitional":
            return await ModernTransport.find(client, layout)
        case "draft":
            return await find_draft(client, layout)
        case "legacy" | "transitional-legacy":
            return LegacyDriver(client, layout)
        case "legacy-intx":
            return LineDriver(client, layout)
        case "four-bar":
            return ProposedDriver(client, layout, common, config)
        case "four-bar-command":
            return CommandDriver(client, layout, common, config)
        case "mirrored":
            return MirroredDriver(client, layout)
        case "offsets":
            return await find_offsets(client, layout)
        case "offsets-table":
            return await find_table(client, layout)
    raise InvalidError(layout)


WAYS = (
    "modern", "draft", "transitional", "transitional-legacy", "legacy", "legacy-intx",
    "four-bar", "four-bar-command", "mirrored", "offsets", "offsets-table",
)  # fmt: skip
"""Every layout, and how it is driven where there is more than one way."""
LEGACY_WAYS = ("transitional-legacy", "legacy", "legacy-intx")


def layout_of(way: str) -> str:
    return way.removesuffix("-legacy")


@dataclass
class Shown:
    """A model's function on a socket, and a client that has its memory."""

    model: Model
    function: VirtioFunction
    server: VfioUserServer
    client: VfioUserClient
    memory: DmaMemory


@asynccontextmanager
async def shown(model: Model, layout: str, folder: Path) -> AsyncIterator[Shown]:
    """Serve a function for a model and attach to it."""
    part = function(model, layout)
    server = VfioUserServer(part, folder / "function.sock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.run)
        await nursery.start(server.serve)
        with DmaMemory(16 << 20) as memory:
            async with connect(server.path, memory) as client:
                yield Shown(model, part, server, client, memory)
        nursery.cancel_scope.cancel()
    part.close()


@asynccontextmanager
async def driven(model: Model, way: str, folder: Path) -> AsyncIterator[VirtioDevice]:
    """Show a model in a layout, and find it as a driver does."""
    async with shown(model, layout_of(way), folder) as here:
        transport = await driver_for(here.client, way)
        async with opened(transport):
            kind = LegacyDevice if way in LEGACY_WAYS else VirtioDevice
            yield kind(transport, await transport.identify())
