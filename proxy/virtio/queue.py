"""Waiting on virtqueues: for used chains, or for the answer to one request."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import trio

from proxy.errors import again
from proxy.memory import DmaBuffer
from proxy.virtio.ring import (
    DriverQueue,
    DriverQueueStatistics,
    RingLayout,
    table_bytes,
)
from proxy.virtio.transport import QueueSignal, Transport
from vbus.errors import NoDeviceError, VbusError
from vbus.virtio.common import Ring

Buffers = Sequence[tuple[int, int]]
"""(address, size) of each buffer."""

_BATCH = 64


class Virtqueue:
    """A ring of ours and its two notifications; one task drains it."""

    def __init__(self, index: int, core: DriverQueue, signal: QueueSignal) -> None:
        self.index = index
        self.core = core
        self._signal = signal
        core.disable_interrupts()

    @classmethod
    async def open(
        cls,
        transport: Transport,
        index: int,
        features: int,
        *,
        size: int,
        entries: int = 0,
    ) -> Self:
        """Lay a ring of up to `size` entries and let the device use it.

        Chains of up to `entries` buffers take one descriptor, with INDIRECT_DESC.
        Raises what the host refuses with.
        """
        limit = await transport.queue_limit(index)
        while size > max(limit, 1):
            size //= 2
        memory = await transport.queue_memory(index, RingLayout.bytes_for(size))
        layout = RingLayout.at(memory.addr, size)
        tables = 0
        if entries and features >> Ring.INDIRECT_DESC & 1:
            room = table_bytes(size, entries)
            tables = transport.allocate(room, alignment=16).addr
        core = DriverQueue(
            transport.space, size, layout, features, tables=tables, entries=entries
        )
        return cls(index, core, await transport.enable_queue(index, size, layout))

    def add(self, chains: Sequence[tuple[Buffers, Buffers, Any]]) -> int:
        """Add (readable, writable, token): how many had room. Raises VbusError."""
        return self.core.add_batch(chains)

    def kick(self) -> None:
        """Tell the device of what was added, if it wants to know."""
        if self.core.kick_needed():
            self._signal.kick()

    def collect(self, limit: int = _BATCH) -> list[tuple[Any, int]]:
        """Take (token, bytes written) of used chains. Raises DriverQueueError."""
        return self.core.collect(limit)

    async def wait(self) -> None:
        """Wait until there may be used chains; a checkpoint.

        Raises the error once the device is gone.
        """
        while not self.core.enable_interrupts():
            if not self._signal.rearm():
                await self._signal.wait()
                self.core.disable_interrupts()
                return
            await trio.lowlevel.checkpoint()
        self.core.disable_interrupts()
        await trio.lowlevel.checkpoint()

    def statistics(self) -> DriverQueueStatistics:
        """A snapshot of the counters."""
        return self.core.statistics()


class Slot:
    """A piece of memory for one request at a time.

    Free once both its user and the device have let go of it: a request that was
    cancelled is still under way.
    """

    def __init__(self, buffer: DmaBuffer, free: Callable[["Slot"], object]) -> None:
        self.buffer = buffer
        self.view = buffer.view
        self._free = free
        self._holders = 0

    def at(self, offset: int, size: int) -> tuple[int, int]:
        """Give a part of it as a buffer."""
        return self.buffer.addr + offset, size

    def take(self) -> None:
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._free(self)


class SlotPool:
    """Slots of equal size."""

    def __init__(self, transport: Transport, count: int, size: int) -> None:
        self._slots = [
            Slot(transport.allocate(size), self._give_back) for _ in range(count)
        ]
        self._free = trio.Semaphore(count, max_value=count)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait for a free slot and use it in the body."""
        await self._free.acquire()
        slot = self._slots.pop()
        slot.take()
        try:
            yield slot
        finally:
            slot.leave()

    def _give_back(self, slot: Slot) -> None:
        self._slots.append(slot)
        self._free.release()


@dataclass(eq=False)
class _Request:
    """A chain on its way, whose buffers lie in a slot."""

    slot: Slot
    written: int | None = None
    event: trio.Event = field(default_factory=trio.Event)


class RequestQueue:
    """A virtqueue of requests and answers, for any number of tasks."""

    def __init__(self, queue: Virtqueue) -> None:
        self.queue = queue
        self._room = trio.Event()
        self._waiting: set[_Request] = set()
        self._ended: VbusError | None = None

    async def run(self) -> None:
        """Take the answers until cancelled; then whoever waits for one gets an error.

        Raises DriverQueueError, or the error once the device is gone.
        """
        try:
            while True:
                self._take()
                await self.queue.wait()
        except VbusError as error:
            self._ended = error
            raise
        finally:
            self._end()

    def _take(self) -> None:
        for request, written in self.queue.collect():
            self._waiting.discard(request)
            request.written = written
            request.slot.leave()
            request.event.set()
            self._room.set()

    def _end(self) -> None:
        if self._ended is None:
            self._ended = NoDeviceError("the device is not driven any more")
        self._room.set()
        for request in self._waiting:
            request.slot.leave()  # whoever gets it next is told of the end, too
            request.event.set()

    async def ask(self, slot: Slot, readable: Buffers, writable: Buffers) -> int:
        """Send a request, wait for its answer: the bytes that were written.

        Raises the error that ended `run`.
        """
        request = _Request(slot)
        while self._ended is None:
            if self.queue.add([(readable, writable, request)]):
                break
            self._room = trio.Event()
            await self._room.wait()
        else:
            raise again(self._ended)
        slot.take()
        self._waiting.add(request)
        self.queue.kick()
        await request.event.wait()
        if request.written is None:
            assert self._ended is not None
            raise again(self._ended)
        return request.written
