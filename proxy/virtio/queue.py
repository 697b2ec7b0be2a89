"""Waiting on virtqueues: for used chains, or for the answer to one request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import trio

from proxy.errors import again
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


@dataclass(eq=False)
class _Request:
    """A chain on its way; `done` runs when the device let go of its buffers."""

    done: Callable[[], object]
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
            request.done()
            request.event.set()
            self._room.set()

    def _end(self) -> None:
        if self._ended is None:
            self._ended = NoDeviceError("the device is not driven any more")
        self._room.set()
        for request in self._waiting:
            request.event.set()

    async def ask(
        self, readable: Buffers, writable: Buffers, done: Callable[[], object]
    ) -> int:
        """Send a request, wait for its answer: the bytes that were written.

        `done` is called when the buffers are ours again, which is later than the return
        if that is a cancellation. Raises the error that ended `run`.
        """
        request = _Request(done)
        try:
            while self._ended is None:
                if self.queue.add([(readable, writable, request)]):
                    break
                self._room = trio.Event()
                await self._room.wait()
            else:
                raise again(self._ended)
        except BaseException:
            done()
            raise
        self._waiting.add(request)
        self.queue.kick()
        await request.event.wait()
        if request.written is None:
            assert self._ended is not None
            raise again(self._ended)
        return request.written
