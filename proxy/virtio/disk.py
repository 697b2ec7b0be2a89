"""virtio-blk from the driver's side: an async block device (virtio 1.2, 5.2)."""

import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import trio

from proxy.tasks import unwrapped
from proxy.virtio.device import VirtioDevice
from proxy.virtio.queue import RequestQueue, Slot, SlotPool
from vbus.errors import InvalidError, PermissionDeniedError, ProtocolError, VbusError
from vbus.virtio.blk import (
    HEADER,
    ID_SIZE,
    RANGE,
    SECTOR,
    UNMAP,
    Answer,
    Feature,
    Request,
)
from vbus.virtio.common import bits

WANTED: Final = bits(
    Feature.RO,
    Feature.BLK_SIZE,
    Feature.FLUSH,
    Feature.TOPOLOGY,
    Feature.CONFIG_WCE,
    Feature.MQ,
    Feature.DISCARD,
    Feature.WRITE_ZEROES,
)
_QUEUE_SIZE: Final = 128
_SLOTS: Final = 32
_CHUNK: Final = 128 << 10
"""Most data in one request; longer ones are cut, and done side by side."""
_HEAD: Final = 64
_STATUS_AT: Final = HEADER.size
_CAPACITY: Final = struct.Struct("<Q")
_LIMITS_AT: Final = 34
_LIMITS: Final = struct.Struct("<HIIIIIB")
_NO_STATUS: Final = 0xFF


class DiskError(VbusError):
    """The disk could not do it (EIO)."""


@dataclass(frozen=True)
class DiskStatistics:
    """Requests that the device answered, and bytes of data; `errors` are refusals."""

    size: int
    queues: int
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    discards: int
    errors: int


_Work: TypeAlias = Callable[[int, int], Awaitable[None]]
"""Of one piece: offset and size."""


class Disk:
    """A disk that was brought up by `start`; sizes and offsets are in bytes."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.size = 0
        self.read_only = False
        self.resized = trio.Event()
        """Set when `size` has changed; a new one is here for the next time."""
        self._queues: list[RequestQueue] = []
        self._pool: SlotPool | None = None
        self._next = 0
        self._range_limit = {Request.DISCARD: 0, Request.WRITE_ZEROES: 0}
        self._counts = dict.fromkeys(DiskStatistics.__dataclass_fields__, 0)

    async def start(self, *, packed: bool = False) -> None:
        """Bring the device up; `run` must run for requests to be answered.

        Raises what `VirtioDevice.negotiate` does.
        """
        device = self.device
        await device.negotiate(WANTED, packed=packed)
        self.read_only = device.has(Feature.RO)
        await self._read_size()
        raw = await device.transport.read_config(_LIMITS_AT, _LIMITS.size)
        queues, discard, _, _, zeroes, _, _ = _LIMITS.unpack(raw)
        if device.has(Feature.DISCARD):
            self._range_limit[Request.DISCARD] = discard * SECTOR
        if device.has(Feature.WRITE_ZEROES):
            self._range_limit[Request.WRITE_ZEROES] = zeroes * SECTOR
        count = queues if device.has(Feature.MQ) else 1
        for index in range(min(count, device.identity.queues)):
            queue = await device.open_queue(index, _QUEUE_SIZE, entries=3)
            self._queues.append(RequestQueue(queue))
        self._pool = SlotPool(device.transport, _SLOTS, _HEAD + _CHUNK)
        await device.ready()

    async def run(self) -> None:
        """Take answers and notice changes of size, until cancelled.

        Raises ProtocolError once the device is broken, or the error when it goes.
        """
        with unwrapped():
            async with trio.open_nursery() as nursery:
                for queue in self._queues:
                    nursery.start_soon(queue.run)
                nursery.start_soon(self.device.watch, partial(self._resized, nursery))

    def _resized(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._read_size)

    async def _read_size(self) -> None:
        raw = await self.device.transport.read_config(0, _CAPACITY.size)
        size = _CAPACITY.unpack(raw)[0] * SECTOR
        if size != self.size:
            self.size = size
            self.resized.set()
            self.resized = trio.Event()

    # The block device

    async def read(self, offset: int, size: int) -> bytes:
        """Read whole sectors. Raises InvalidError, DiskError."""
        self._check(offset, size)
        parts: dict[int, bytes] = {}

        async def one(at: int, length: int) -> None:
            async with self._memory.slot() as slot:
                await self._ask(slot, Request.IN, at, writable=[slot.at(_HEAD, length)])
                parts[at] = slot.view.read(_HEAD, length)

        await self._chunks(one, offset, size)
        self._count("read", size)
        if len(parts) == 1:
            return parts[offset]
        return b"".join(parts[at] for at in sorted(parts))

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole sectors; they survive a crash after the next `flush`.

        Raises InvalidError, PermissionDeniedError, DiskError.
        """
        rest = memoryview(data)
        self._check(offset, len(rest), write=True)

        async def one(at: int, length: int) -> None:
            async with self._memory.slot() as slot:
                part = rest[at - offset : at - offset + length]
                slot.view.write(_HEAD, part)
                await self._ask(
                    slot, Request.OUT, at, readable=[slot.at(_HEAD, length)]
                )

        await self._chunks(one, offset, len(rest))
        self._count("written", len(rest))

    async def flush(self) -> None:
        """Make durable what was written before. Raises DiskError."""
        if self.device.has(Feature.FLUSH):
            async with self._memory.slot() as slot:
                await self._ask(slot, Request.FLUSH, 0)
        self._counts["flushes"] += 1

    async def discard(self, offset: int, size: int) -> None:
        """Give up the content; a device that cannot does nothing."""
        if not self._range_limit[Request.DISCARD]:
            self._check(offset, size, write=True)
            return
        await self._ranges(Request.DISCARD, offset, size, 0)

    async def write_zeroes(self, offset: int, size: int, *, unmap: bool = True) -> None:
        """Make it read as zeros, with holes if `unmap`. Raises as `write` does."""
        if self._range_limit[Request.WRITE_ZEROES]:
            flags = UNMAP if unmap else 0
            await self._ranges(Request.WRITE_ZEROES, offset, size, flags)
            return
        self._check(offset, size, write=True)
        for at in range(offset, offset + size, _CHUNK):
            await self.write(at, bytes(min(_CHUNK, offset + size - at)))

    async def serial(self) -> str:
        """Ask for the serial number."""
        async with self._memory.slot() as slot:
            await self._ask(slot, Request.GET_ID, 0, writable=[slot.at(_HEAD, ID_SIZE)])
            raw = slot.view.read(_HEAD, ID_SIZE)
        return raw.split(b"\0", 1)[0].decode(errors="replace")

    # Inside

    def _check(self, offset: int, size: int, *, write: bool = False) -> None:
        if write and self.read_only:
            raise PermissionDeniedError(f"{self.device.name} is read-only")
        if offset % SECTOR or size % SECTOR or offset < 0:
            raise InvalidError(f"{size} bytes at {offset} are not whole sectors")
        if not 0 < size <= self.size - offset:
            raise InvalidError(
                f"{size} bytes at {offset} are not on a disk of {self.size}"
            )

    @property
    def _memory(self) -> SlotPool:
        if self._pool is None:
            raise InvalidError(f"{self.device.name} is not started")
        return self._pool

    async def _chunks(self, one: _Work, offset: int, size: int) -> None:
        if size <= _CHUNK:
            await one(offset, size)
            return
        with unwrapped():
            async with trio.open_nursery() as nursery:
                for at in range(offset, offset + size, _CHUNK):
                    nursery.start_soon(one, at, min(_CHUNK, offset + size - at))

    async def _ranges(self, kind: Request, offset: int, size: int, flags: int) -> None:
        self._check(offset, size, write=True)
        limit = self._range_limit[kind]
        for at in range(offset, offset + size, limit):
            length = min(limit, offset + size - at)
            async with self._memory.slot() as slot:
                what = RANGE.pack(at // SECTOR, length // SECTOR, flags)
                slot.view.write(_HEAD, what)
                await self._ask(slot, kind, 0, readable=[slot.at(_HEAD, RANGE.size)])
        self._counts["discards"] += kind == Request.DISCARD

    async def _ask(
        self,
        slot: Slot,
        kind: Request,
        offset: int,
        *,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
    ) -> None:
        head = HEADER.pack(kind, 0, offset // SECTOR) + bytes([_NO_STATUS])
        slot.view.write(0, head)
        queue = self._queues[self._next % len(self._queues)]
        self._next += 1
        header, status_byte = slot.at(0, HEADER.size), slot.at(_STATUS_AT, 1)
        await queue.ask(slot, [header, *readable], [*writable, status_byte])
        status = slot.view.read(_STATUS_AT, 1)[0]
        if status != Answer.OK:
            self._counts["errors"] += 1
            if status == _NO_STATUS:
                raise ProtocolError(f"{self.device.name} answers without a status")
            word = "cannot" if status == Answer.UNSUPP else "failed to"
            raise DiskError(
                f"{self.device.name} {word} {kind.name.lower()} at {offset}"
            )

    def _count(self, way: str, size: int) -> None:
        self._counts["reads" if way == "read" else "writes"] += 1
        self._counts[f"{way}_bytes"] += size

    def statistics(self) -> DiskStatistics:
        """A snapshot of the counters."""
        return DiskStatistics(
            **(self._counts | {"size": self.size, "queues": len(self._queues)})
        )
