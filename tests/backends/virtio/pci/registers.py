"""A function without a socket: registers by name, and interrupts that are recorded."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import trio

from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId
from backends.virtio.device import Chain, DeviceQueue, LiveRing, VirtioDevice
from backends.virtio.features import Dependencies
from backends.virtio.pci import VirtioFunction, function
from shm import create_memfd
from vbus.pci.constants import MSIX_ENABLE, Offset, Region
from vbus.virtio.common import Status

MEMORY = 1 << 20
SETUP = Status.ACKNOWLEDGE | Status.DRIVER
LIVE = SETUP | Status.FEATURES_OK | Status.DRIVER_OK
FIELDS = (
    Field("level", 0, "I", changes=True, written=Written.ANY),
    Field("fixed", 4, "I"),
)
NO_VECTOR = 0xFFFF


class Sample(VirtioDevice):
    """Two queues, a configuration of eight bytes; gives chains back as they are."""

    device_id = DeviceId.ENTROPY
    dependencies: ClassVar[Dependencies] = {1: (0,)}

    def __init__(self, *, latch: bool = False, queues: int = 2) -> None:
        config = ConfigSpace(FIELDS, latch=latch)
        super().__init__([16] * queues, features=3, config=config)
        self.change_config(level=0x44332211, fixed=42)
        self.kicks: list[int] = []

    def kick(self, index: int) -> None:
        self.kicks.append(index)
        super().kick(index)

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        for chain in chains:
            self.complete(queue.index, ring, chain, 0)
        await trio.lowlevel.checkpoint()


@dataclass
class Bench:
    """A function and what a guest can do with it."""

    model: Sample
    function: VirtioFunction
    raised: list[tuple[int, int]] = field(default_factory=list)

    def trigger(self, index: int, vector: int) -> bool:
        self.raised.append((index, vector))
        return True

    def get(self, bar: int, offset: int, size: int) -> int:
        data = self.function.read(bar, offset, size)
        assert isinstance(data, bytes)
        assert len(data) == size
        return int.from_bytes(data, "little")

    def put(self, bar: int, offset: int, size: int, value: int) -> None:
        self.function.write(bar, offset, value.to_bytes(size, "little"))

    def command(self, bits: int) -> None:
        self.put(Region.CONFIG, Offset.COMMAND, 2, bits)

    def msix(self, on: bool) -> None:
        config = self.function.config
        assert config.msix is not None
        at = config.offset_of(config.msix) + 2
        self.put(Region.CONFIG, at, 2, MSIX_ENABLE if on else 0)

    def map(self) -> None:
        """Give it memory from address 0 on."""
        fd = create_memfd("guest", MEMORY)
        try:
            self.function.memory.map(0, MEMORY, fd)
        finally:
            os.close(fd)


@contextmanager
def bench(layout: str, *, latch: bool = False, queues: int = 2) -> Iterator[Bench]:
    """A function that a client is attached to, with bus mastering on."""
    model = Sample(latch=latch, queues=queues)
    bench = Bench(model, function(model, layout))
    bench.map()
    bench.function.attach(bench)
    bench.command(0b111)
    try:
        yield bench
    finally:
        bench.function.detach()
        bench.function.memory.clear()
        bench.function.close()
