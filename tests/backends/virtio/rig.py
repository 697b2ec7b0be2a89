"""A driver of the real ring code on a device model, with no transport between them."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
import trio.testing

from backends.virtio.constants import LEGACY_MASK, Ring, Status
from backends.virtio.device import VirtioDevice
from backends.virtio.saved import Records
from proxy.virtio.ring import DriverQueue, RingLayout
from shm import AddressSpace, create_memfd

SIZE = 96 << 20
BUFFERS = 16 << 20
SETUP = Status.ACKNOWLEDGE | Status.DRIVER
LIVE = SETUP | Status.FEATURES_OK | Status.DRIVER_OK


@dataclass
class Request:
    """One chain: where the device writes, and what it said."""

    address: int
    room: int
    written: int | None = None


@dataclass
class Rig:
    """The driver, and the transport that records."""

    device: VirtioDevice
    space: AddressSpace
    rings: dict[int, DriverQueue] = field(default_factory=dict)
    interrupts: list[int] = field(default_factory=list)
    config_interrupts: int = 0
    saves: int = 0
    features: int = 0
    _next: int = BUFFERS
    _told: trio.Event = field(default_factory=trio.Event)

    # VirtioTransport

    records: Records | None = None

    def save(self) -> None:
        self.saves += 1

    def queue_interrupt(self, index: int) -> None:
        self.interrupts.append(index)
        self._wake()

    def config_interrupt(self) -> None:
        self.config_interrupts += 1
        self._wake()

    def _wake(self) -> None:
        self._told.set()
        self._told = trio.Event()

    # The driver

    def negotiate(
        self, without: int = 0, *, legacy: bool = False, extra: int = 0
    ) -> int:
        """Accept all that is offered but `without`; give the status."""
        device = self.device
        device.set_status(0)
        device.legacy = legacy
        device.set_status(SETUP)
        self.features = device.offered & ~without | extra
        if legacy:
            self.features &= LEGACY_MASK
        device.set_features(self.features)
        if not legacy:
            device.set_status(SETUP | Status.FEATURES_OK)
        return int(device.status)

    def make_ring(self, index: int, size: int | None = None) -> DriverQueue:
        queue = self.device.queue(index)
        size = size or queue.max_size
        at = RingLayout.at(index << 16, size)
        self.space.write(index << 16, bytes(1 << 16))
        ring = DriverQueue(self.space, size, at, self.features)
        queue.set_up(size=size, desc=at.desc, driver=at.driver, device=at.device)
        self.rings[index] = ring
        self.device.enable_queue(index)
        return ring

    def start(
        self, without: int = 1 << Ring.PACKED, *, legacy: bool = False, size: int = 0
    ) -> None:
        """Bring the device to life with all its queues."""
        self.negotiate(without, legacy=legacy)
        self.rings.clear()
        for queue in self.device.queues:
            self.make_ring(queue.index, size or None)
        self.device.set_status(int(self.device.status) | Status.DRIVER_OK)
        assert Status.DRIVER_OK in self.device.status

    def take(self, size: int) -> int:
        """Memory for a buffer."""
        at = self._next
        self._next += max(size + 63 & ~63, 64)
        assert self._next <= SIZE
        return at

    def add(self, index: int, out: bytes = b"", room: int = 0) -> Request:
        """Put a chain in and kick if the device wants that."""
        readable, writable = [], []
        if out:
            at = self.take(len(out))
            self.space.write(at, out)
            readable.append((at, len(out)))
        request = Request(self.take(room), room)
        if room:
            writable.append((request.address, room))
        assert self.rings[index].add_batch([(readable, writable, request)]) == 1
        if self.rings[index].kick_needed():
            self.device.kick(index)
        return request

    def collect(self, index: int) -> list[Request]:
        done = []
        for request, written in self.rings[index].collect(64):
            request.written = written
            done.append(request)
        return done

    def data(self, request: Request) -> bytes:
        assert request.written is not None
        return self.space.read(request.address, request.written)

    async def done(self, index: int, request: Request) -> bytes:
        """Wait until the device gave the request back, led by its interrupts alone."""
        with trio.fail_after(10):
            while request.written is None:
                told = self._told
                self.collect(index)
                if (
                    request.written is None
                    and not self.rings[index].enable_interrupts()
                ):
                    await told.wait()
        return self.data(request)

    async def request(self, index: int, out: bytes = b"", room: int = 0) -> bytes:
        """Put in a chain and wait for what the device writes."""
        return await self.done(index, self.add(index, out, room))


@asynccontextmanager
async def rigged(device: VirtioDevice, *, features: int = 0) -> AsyncIterator[Rig]:
    """Run the device, shown to a driver."""
    space = AddressSpace()
    fd = create_memfd("driver", SIZE)
    space.map(0, SIZE, fd)
    rig = Rig(device, space)
    device.attach(rig, features=features)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run)
            yield rig
            nursery.cancel_scope.cancel()
        device.detach()
    finally:
        space.close()
        os.close(fd)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()
