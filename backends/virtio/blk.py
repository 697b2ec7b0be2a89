"""virtio-blk (virtio 1.2, section 5.2) over a DiskImage.

A request that the page cache can answer is answered in the turn it came in; every
other one runs in a thread, a bounded number at a time, so a slow disk blocks only
itself.

What a driver may rely on: a request is given back with S_OK only after it was done; in
write-through mode only after it is on the medium; after a FLUSH that was given back
with S_OK, so is every write that was given back before the FLUSH came.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId, bits
from backends.virtio.device import (
    Chain,
    DeviceQueue,
    LiveRing,
    MalformedError,
    VirtioDevice,
)
from backends.virtio.image import DiskImage
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

THREADS: Final = 16
INLINE_LIMIT: Final = 64 << 10
CHUNK: Final = 1 << 20
_BATCH: Final = 16
_MAX_RANGE: Final = 1 << 22
_MAX_RANGES: Final = 16
_SEGMENTS: Final = 126
_CHANGES: Final = (Request.OUT, Request.DISCARD, Request.WRITE_ZEROES)


FIELDS: Final = (
    Field("capacity", 0, "Q", changes=True),
    Field("size_max", 8, "I"),
    Field("seg_max", 12, "I"),
    Field("cylinders", 16, "H", changes=True),
    Field("heads", 18, "B"),
    Field("sectors", 19, "B"),
    Field("blk_size", 20, "I"),
    Field("physical_block_exp", 24, "B"),
    Field("alignment_offset", 25, "B"),
    Field("min_io_size", 26, "H"),
    Field("opt_io_size", 28, "I"),
    Field("writeback", 32, "B", written=Written.ANY),
    Field("num_queues", 34, "H"),
    Field("max_discard_sectors", 36, "I"),
    Field("max_discard_seg", 40, "I"),
    Field("discard_sector_alignment", 44, "I"),
    Field("max_write_zeroes_sectors", 48, "I"),
    Field("max_write_zeroes_seg", 52, "I"),
    Field("write_zeroes_may_unmap", 56, "B"),
    Field("unused", 57, "3s"),
)

_HEADS, _TRACK = 16, 63


@dataclass(frozen=True)
class BlkStatistics:
    """Requests by kind, bytes, errors; `inline` needed no thread."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    flushes: int
    discards: int
    errors: int
    unsupported: int
    inline: int


class _RefusedError(Exception):
    """How a request is answered that is not done."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.name)
        self.answer = answer


class _Job(NamedTuple):
    """A request whose header was read, once. `size`: bytes of data."""

    chain: Chain
    kind: int
    offset: int
    size: int
    durable: bool


class VirtioBlk(VirtioDevice):
    """A disk."""

    device_id = DeviceId.BLOCK

    def __init__(
        self,
        image: DiskImage,
        *,
        serial: str = "",
        queues: int = 1,
        queue_size: int = 256,
        write_cache: bool = True,
        discard: bool = True,
        latch: bool = False,
    ) -> None:
        """The image stays the caller's to close, after `run` has ended.

        Without a `write_cache` every write is durable when it is answered, and the
        driver is told of no cache that it could flush or switch.
        """
        self.image = image
        self.serial = serial.encode()[:ID_SIZE]
        self._threads = trio.CapacityLimiter(THREADS)
        self._copies = trio.Semaphore(THREADS)
        self._counts = dict.fromkeys(BlkStatistics.__dataclass_fields__, 0)
        features = bits(
            Feature.SEG_MAX, Feature.GEOMETRY, Feature.BLK_SIZE, Feature.TOPOLOGY,
            Feature.MQ,
        )  # fmt: skip
        if write_cache:
            features |= bits(Feature.FLUSH, Feature.CONFIG_WCE)
        if image.read_only:
            features |= bits(Feature.RO)
        else:
            features |= bits(Feature.WRITE_ZEROES)
            features |= bits(Feature.DISCARD) if discard else 0
        config = ConfigSpace(FIELDS, latch=latch)
        super().__init__([queue_size] * queues, features=features, config=config)
        self._fill_config(discard)

    def _fill_config(self, discard: bool) -> None:
        block = self.image.block_size()
        values = {
            "seg_max": _SEGMENTS,
            "heads": _HEADS,
            "sectors": _TRACK,
            "blk_size": SECTOR,
            "physical_block_exp": (block // SECTOR).bit_length() - 1,
            "min_io_size": block // SECTOR,
            "num_queues": len(self.queues),
            "writeback": 1,
        }
        if not self.image.read_only:
            values |= {
                "max_write_zeroes_sectors": _MAX_RANGE,
                "max_write_zeroes_seg": _MAX_RANGES,
                "write_zeroes_may_unmap": int(discard),
            }
            if discard:
                values |= {
                    "max_discard_sectors": _MAX_RANGE,
                    "max_discard_seg": _MAX_RANGES,
                    "discard_sector_alignment": block // SECTOR,
                }
        self.change_config(**values)
        self.resized()

    @property
    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.config.number("capacity")

    def resized(self) -> None:
        """Look how large the image is now and tell the driver."""
        sectors = self.image.sectors()
        cylinders = min(sectors // (_HEADS * _TRACK), 65535)
        self.change_config(capacity=sectors, cylinders=cylinders)

    @property
    def durable(self) -> bool:
        """Is every write on the medium before it is answered (5.2.6.2)?"""
        if self.has(Feature.CONFIG_WCE):
            return self.config.number("writeback") == 0
        return not self.has(Feature.FLUSH)

    def started(self) -> None:
        if self.has(Feature.CONFIG_WCE) and not self.has(Feature.FLUSH):
            self.config.write(FIELDS_BY_NAME["writeback"].offset, b"\0", driver_ok=True)
            self.config.commit()

    def was_reset(self) -> None:
        # The field is the driver's; a reset makes it what it was at first.
        self.config.set("writeback", 1)

    # Queues

    async def drive(self, queue: DeviceQueue, ring: LiveRing) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                chains = ring.pop(_BATCH)
                if not chains:
                    await ring.wait()
                    continue
                self._begin(queue, ring, chains, nursery)
                await trio.lowlevel.checkpoint()

    def _begin(
        self,
        queue: DeviceQueue,
        ring: LiveRing,
        chains: Sequence[Chain],
        nursery: trio.Nursery,
    ) -> None:
        """Answer what can be answered at once, together; start the rest."""
        done = []
        for chain in chains:
            try:
                job = self._parse(chain)
                written = self._try(job)
            except _RefusedError as refused:
                done.append((chain, self._answer(chain, refused.answer, 0)))
                continue
            if written is None:
                nursery.start_soon(self._work, queue, ring, job)
            else:
                self._counts["inline"] += 1
                done.append((chain, self._answer(chain, Answer.OK, written)))
        self.complete_batch(queue.index, ring, done)

    def _parse(self, chain: Chain) -> _Job:
        if chain.readable < HEADER.size or chain.writable < 1:
            raise MalformedError("a request without room for its header or status")
        kind, _, sector = HEADER.unpack(chain.read(0, HEADER.size))
        size = 0
        if kind == Request.IN:
            size = chain.writable - 1
        elif kind == Request.OUT:
            size = chain.readable - HEADER.size
        if size % SECTOR or (size and sector + size // SECTOR > self.capacity):
            raise _RefusedError(Answer.IOERR)
        if kind in _CHANGES and self.image.read_only:
            raise _RefusedError(Answer.IOERR)
        return _Job(chain, kind, sector * SECTOR, size, self.durable)

    def _try(self, job: _Job) -> int | None:
        """Do it if it takes no time: bytes written to the driver, or None."""
        if job.kind == Request.GET_ID:
            return self._give_id(job.chain)
        if job.size > INLINE_LIMIT:
            return None
        if job.kind == Request.IN and self._read_at_once(job):
            self._count("read", job.size)
            return job.size
        if job.kind == Request.OUT and not job.durable:
            image, move = self.image, job.chain.pwritev
            if image.write_at_once(move, job.offset, HEADER.size, job.size):
                self._count("written", job.size)
                return 0
        return None

    def _read_at_once(self, job: _Job) -> bool:
        """Read if the page cache has it. A real error is found again by the thread."""
        fd = self.image.fileno()
        try:
            done = job.chain.preadv(fd, job.offset, 0, job.size, os.RWF_NOWAIT)
        except OSError:
            return False
        return done == job.size

    async def _work(self, queue: DeviceQueue, ring: LiveRing, job: _Job) -> None:
        answer, written = Answer.OK, 0
        try:
            written = await self._do(ring, job)
        except _RefusedError as refused:
            answer = refused.answer
        except OSError:
            answer = Answer.IOERR
        if ring.alive:
            status = self._answer(job.chain, answer, written)
            self.complete(queue.index, ring, job.chain, status)

    async def _do(self, ring: LiveRing, job: _Job) -> int:
        match job.kind:
            case Request.IN:
                return await self._read(ring, job)
            case Request.OUT:
                return await self._write(ring, job)
            case Request.FLUSH:
                await trio.to_thread.run_sync(self.image.flush, limiter=self._threads)
                self._counts["flushes"] += 1
            case Request.DISCARD | Request.WRITE_ZEROES:
                await self._ranges(job)
            case _:
                raise _RefusedError(Answer.UNSUPP)
        return 0

    async def _read(self, ring: LiveRing, job: _Job) -> int:
        for at in range(0, job.size, CHUNK):
            size = min(CHUNK, job.size - at)
            data = await trio.to_thread.run_sync(
                self.image.read, job.offset + at, size, limiter=self._threads
            )
            if not ring.alive:
                return 0
            job.chain.write(at, data)
        self._count("read", job.size)
        return job.size

    async def _write(self, ring: LiveRing, job: _Job) -> int:
        for at in range(0, job.size, CHUNK):
            async with self._copies:  # so that waiting writes hold no copy of the data
                if not ring.alive:
                    return 0
                data = job.chain.read(HEADER.size + at, min(CHUNK, job.size - at))
                await trio.to_thread.run_sync(
                    self._write_chunk, job.offset + at, data, job.durable,
                    limiter=self._threads,
                )  # fmt: skip
        self._count("written", job.size)
        return 0

    def _write_chunk(self, offset: int, data: bytes, durable: bool) -> None:
        self.image.write(offset, data, durable=durable)

    async def _ranges(self, job: _Job) -> None:
        ranges = self._parse_ranges(job)
        discard = job.kind == Request.DISCARD
        may_unmap = self.config.number("write_zeroes_may_unmap") == 1
        for sector, count, flags in ranges:
            await trio.to_thread.run_sync(
                self._discard if discard else self._zero,
                sector * SECTOR, count * SECTOR, may_unmap and flags & UNMAP != 0,
                job.durable, limiter=self._threads,
            )  # fmt: skip
        self._counts["discards"] += discard

    def _parse_ranges(self, job: _Job) -> list[tuple[int, int, int]]:
        """Every range is checked before the first takes effect (5.2.6.2)."""
        wanted = (
            Feature.DISCARD if job.kind == Request.DISCARD else Feature.WRITE_ZEROES
        )
        if not self.has(wanted):
            raise _RefusedError(Answer.UNSUPP)
        size = job.chain.readable - HEADER.size
        if size == 0 or size % RANGE.size or size > RANGE.size * _MAX_RANGES:
            raise _RefusedError(Answer.IOERR)
        ranges = list(RANGE.iter_unpack(job.chain.read(HEADER.size, size)))
        for sector, count, flags in ranges:
            if flags & ~(0 if wanted is Feature.DISCARD else UNMAP):
                raise _RefusedError(Answer.UNSUPP)
            if not 0 < count <= _MAX_RANGE or sector + count > self.capacity:
                raise _RefusedError(Answer.IOERR)
        return ranges

    def _discard(self, offset: int, size: int, unmap: bool, durable: bool) -> None:
        self.image.discard(offset, size)

    def _zero(self, offset: int, size: int, unmap: bool, durable: bool) -> None:
        self.image.write_zeroes(offset, size, unmap=unmap, durable=durable)

    def _give_id(self, chain: Chain) -> int:
        if chain.writable < ID_SIZE + 1:
            raise _RefusedError(Answer.IOERR)
        chain.write(0, self.serial.ljust(ID_SIZE, b"\0"))
        return ID_SIZE

    def _answer(self, chain: Chain, answer: Answer, written: int) -> int:
        """Write the status byte; the number of bytes to give back."""
        self._counts["errors"] += answer is Answer.IOERR
        self._counts["unsupported"] += answer is Answer.UNSUPP
        chain.write(chain.writable - 1, bytes([answer]))
        return written + 1

    def _count(self, way: str, size: int) -> None:
        self._counts["reads" if way == "read" else "writes"] += 1
        self._counts[f"{way}_bytes"] += size

    def io_statistics(self) -> BlkStatistics:
        """A snapshot of the requests."""
        return BlkStatistics(**self._counts)


FIELDS_BY_NAME: Final = {field.name: field for field in FIELDS}
