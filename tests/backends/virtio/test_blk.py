"""virtio-blk: every request type, bounds, durability, errors; no write is lost."""

import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from backends.virtio.blk import Answer, Feature, Request, VirtioBlk
from backends.virtio.constants import Ring, Status, bits
from backends.virtio.image import _KEEP_SIZE, _PUNCH_HOLE, DiskImage, _fallocate
from tests.backends.virtio.rig import Rig, rigged, settle
from vbus.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
)

SECTORS = 4096
OK, IOERR, UNSUPP = (bytes([answer]) for answer in Answer)
PLAIN = bits(Ring.PACKED)


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def content(path: Path) -> bytes:
    return path.read_bytes()


def ranges(*triples: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *triple) for triple in triples)


class Calls(DiskImage):
    """A real image that remembers what was asked of it, and can be slow or fail."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: OSError | None = None

    def _note(self, what: str) -> None:
        self.calls.append(what)
        self.begun.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error

    def read(self, offset: int, size: int) -> bytes:
        self._note("read")
        return super().read(offset, size)

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        self._note("write durable" if durable else "write")
        super().write(offset, data, durable=durable)

    def flush(self) -> None:
        self._note("flush")
        super().flush()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SECTORS * 512))
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Calls]:
    with Calls(path) as image:
        yield image


async def read(rig: Rig, sector: int, count: int, queue: int = 0) -> bytes:
    answer = await rig.request(queue, header(Request.IN, sector), count * 512 + 1)
    assert answer[-1:] == OK
    return answer[:-1]


async def write(rig: Rig, sector: int, data: bytes, queue: int = 0) -> bytes:
    return await rig.request(queue, header(Request.OUT, sector) + data, 1)


# Reading and writing


@pytest.mark.parametrize("without", [0, PLAIN])
@pytest.mark.parametrize("count", [1, 8, 128, 129, 4000])
async def test_what_is_written_is_read_and_in_the_file(
    image: Calls, without: int, count: int
) -> None:
    data = os.urandom(count * 512)
    async with rigged(VirtioBlk(image)) as rig:
        rig.start(without)
        assert await read(rig, 5, 1) == image.path.read_bytes()[5 * 512 : 6 * 512]
        assert await write(rig, 7, data) == OK
        assert await read(rig, 7, count) == data
    assert image.path.read_bytes()[7 * 512 :][: len(data)] == data


async def test_many_requests_on_many_queues_lose_nothing(image: Calls) -> None:
    """Random writes and reads of several sizes, all at once, against a model."""
    random_ = random.Random(2)
    model = bytearray(image.path.read_bytes())
    async with rigged(VirtioBlk(image, queues=4)) as rig:
        rig.start()
        for _ in range(20):
            free = list(range(0, SECTORS, 256))
            random_.shuffle(free)
            pending = []
            for n, sector in enumerate(free[:12]):
                count = random_.choice([1, 3, 8, 64, 200, 256])
                if random_.random() < 0.6:
                    data = random_.randbytes(count * 512)
                    model[sector * 512 : sector * 512 + len(data)] = data
                    out, room = header(Request.OUT, sector) + data, 1
                else:
                    out, room = header(Request.IN, sector), count * 512 + 1
                pending.append((n % 4, sector, rig.add(n % 4, out, room)))
            for queue, sector, request in pending:
                answer = await rig.done(queue, request)
                assert answer[-1:] == OK
                if request.room > 1:
                    size = request.room - 1
                    assert answer[:-1] == model[sector * 512 :][:size]
        done = rig.device
        assert isinstance(done, VirtioBlk)
        assert done.io_statistics().writes > 50
    assert image.path.read_bytes() == model


@pytest.mark.parametrize(
    ("kind", "sector", "size"),
    [
        (Request.IN, SECTORS, 512),
        (Request.IN, SECTORS - 1, 1024),
        (Request.IN, (1 << 64) - 1, 512),
        (Request.IN, 0, 511),
        (Request.OUT, SECTORS, 512),
        (Request.OUT, (1 << 55) - 1, 512),
        (Request.OUT, 0, 100),
    ],
)
async def test_outside_the_disk_is_an_error_and_touches_nothing(
    image: Calls, kind: int, sector: int, size: int
) -> None:
    before = image.path.read_bytes()
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        out = bytes(size) if kind == Request.OUT else b""
        request = rig.add(0, header(kind, sector) + out, 1 if out else size + 1)
        await rig.done(0, request)
        status = rig.space.read(request.address + request.room - 1, 1)
        assert status == IOERR
    assert image.path.read_bytes() == before


async def test_the_serial_number_and_unknown_requests(image: Calls) -> None:
    async with rigged(VirtioBlk(image, serial="disk-0001")) as rig:
        rig.start()
        answer = await rig.request(0, header(Request.GET_ID), 21)
        assert answer == b"disk-0001".ljust(20, b"\0") + OK
        assert await rig.request(0, header(99), 1) == UNSUPP
        short = rig.add(0, header(Request.GET_ID), 5)
        await rig.done(0, short)
        assert rig.space.read(short.address + 4, 1) == IOERR


@pytest.mark.parametrize(("out", "room"), [(b"short", 1), (header(Request.OUT), 0)])
async def test_a_request_without_header_or_status_needs_a_reset(
    image: Calls, out: bytes, room: int
) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        rig.add(0, out, room)
        await settle()
        assert Status.NEEDS_RESET in rig.device.status
        rig.start()
        assert len(await read(rig, 0, 1)) == 512


# Durability (5.2.6.2)


async def test_with_the_cache_on_only_a_flush_reaches_the_medium(image: Calls) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        assert await write(rig, 0, bytes(512)) == OK
        assert "write durable" not in image.calls
        assert await rig.request(0, header(Request.FLUSH), 1) == OK
        assert image.calls[-1] == "flush"


@pytest.mark.parametrize(
    "without", [bits(Feature.FLUSH, Feature.CONFIG_WCE), bits(Feature.FLUSH)]
)
async def test_a_driver_without_flush_gets_every_write_durable(
    image: Calls, without: int
) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start(PLAIN | without)
        assert await write(rig, 3, b"d" * 512) == OK
        assert image.calls == ["write durable"]


async def test_the_cache_switch_is_obeyed_at_once_and_reset(image: Calls) -> None:
    """R28: the one field of a disk that a driver writes."""
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        assert rig.device.read_config(32, 1) == b"\1"
        rig.device.write_config(32, b"\0")
        assert await write(rig, 3, b"d" * 512) == OK
        assert image.calls == ["write durable"]
        rig.start()
        assert rig.device.read_config(32, 1) == b"\1"


async def test_write_through_asks_the_kernel_for_dsync(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = []
    pwritev = os.pwritev

    def record(fd: int, data: list[bytes], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return pwritev(fd, data, offset, flag)

    monkeypatch.setattr(os, "pwritev", record)
    with DiskImage(path) as image:
        image.write(0, b"x" * 512, durable=True)
        image.write(0, b"x" * 512, durable=False)
    assert flags == [os.RWF_DSYNC, 0]


def test_a_short_write_is_gone_on_with(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev

    def short(fd: int, data: list[memoryview], offset: int, flag: int = 0) -> int:
        return pwritev(fd, [data[0][:100]], offset, flag)

    monkeypatch.setattr(os, "pwritev", short)
    data = os.urandom(1024)
    with DiskImage(path) as image:
        image.write(512, data, durable=False)
    assert path.read_bytes()[512:1536] == data


async def test_a_flush_that_fails_is_not_said_to_be_done(image: Calls) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        image.error = OSError(5, "EIO")
        assert await rig.request(0, header(Request.FLUSH), 1) == IOERR
        image.error = None
        assert await rig.request(0, header(Request.FLUSH), 1) == OK


@pytest.mark.parametrize("error", [28, 5])
async def test_no_space_and_media_errors_are_io_errors(
    image: Calls, error: int
) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        rig.device.write_config(32, b"\0")
        image.error = OSError(error, os.strerror(error))
        assert await write(rig, 0, bytes(512)) == IOERR
        image.error = None
        assert await write(rig, 0, bytes(512)) == OK


# A slow disk


async def test_a_slow_request_holds_up_no_other_queue_and_no_other_task(
    image: Calls,
) -> None:
    async with rigged(VirtioBlk(image, queues=2)) as rig:
        rig.start()
        image.gate.clear()
        slow = rig.add(0, header(Request.FLUSH), 1)
        assert len(await read(rig, 0, 1, queue=1)) == 512
        assert len(await read(rig, 0, 1, queue=0)) == 512
        assert slow.written is None
        image.gate.set()
        assert await rig.done(0, slow) == OK


async def test_more_slow_requests_than_threads_are_all_done(image: Calls) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        image.gate.clear()
        rig.device.write_config(32, b"\0")
        pending = [
            rig.add(0, header(Request.OUT, n) + bytes([n]) * 512, 1) for n in range(60)
        ]
        await settle()
        image.gate.set()
        for request in pending:
            assert await rig.done(0, request) == OK
    data = image.path.read_bytes()
    assert all(data[n * 512 : n * 512 + 512] == bytes([n]) * 512 for n in range(60))


async def test_a_reset_waits_for_the_disk_before_the_next_driver_writes(
    image: Calls,
) -> None:
    """R26: an old write never lands on a newer one."""
    async with rigged(VirtioBlk(image)) as rig:
        rig.start(PLAIN | bits(Feature.FLUSH, Feature.CONFIG_WCE))
        image.gate.clear()
        old = rig.add(0, header(Request.OUT, 9) + b"old" + bytes(509), 1)
        assert await trio.to_thread.run_sync(image.begun.wait, 10)
        rig.space.write(old.address, b"\xff")
        rig.device.set_status(0)
        assert rig.device.status == 0
        rig.start()
        new = rig.add(0, header(Request.OUT, 9) + b"new" + bytes(509), 1)
        await settle()
        assert not rig.collect(0)
        image.gate.set()
        assert await rig.done(0, new) == OK
        assert old.written is None
        assert rig.space.read(old.address, 1) == b"\xff"
        assert (await read(rig, 9, 1))[:3] == b"new"


# Discard and write zeroes


async def test_zeroes_and_discards_of_ranges(image: Calls) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        before = image.path.read_bytes()
        for kind, flags in ((Request.WRITE_ZEROES, 0), (Request.WRITE_ZEROES, 1)):
            data = ranges((8, 16, flags), (100 + flags * 8, 8, flags))
            assert await rig.request(0, header(kind) + data, 1) == OK
        assert await read(rig, 8, 16) == bytes(16 * 512)
        assert await read(rig, 100, 16) == bytes(16 * 512)
        discard = header(Request.DISCARD) + ranges((2048, 1024, 0))
        assert await rig.request(0, discard, 1) == OK
        assert await read(rig, 2048, 8) in (bytes(4096), before[2048 * 512 :][:4096])
        assert await read(rig, 24, 8) == before[24 * 512 : 32 * 512]
    assert image.path.stat().st_size == SECTORS * 512


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (ranges((0, 8, 0), (SECTORS - 1, 2, 0)), IOERR),
        (ranges((0, 0, 0)), IOERR),
        (ranges((0, 8, 2)), UNSUPP),
        (ranges((0, 8, 0))[:-1], IOERR),
        (ranges(*[(0, 1, 0)] * 17), IOERR),
        (b"", IOERR),
    ],
)
@pytest.mark.parametrize("kind", [Request.DISCARD, Request.WRITE_ZEROES])
async def test_a_bad_range_is_refused_before_the_first_takes_effect(
    image: Calls, kind: int, data: bytes, status: bytes
) -> None:
    before = image.path.read_bytes()
    async with rigged(VirtioBlk(image)) as rig:
        rig.start()
        assert await rig.request(0, header(kind) + data, 1) == status
    assert image.path.read_bytes() == before


async def test_what_was_not_negotiated_is_unsupported(image: Calls) -> None:
    async with rigged(VirtioBlk(image)) as rig:
        rig.start(PLAIN | bits(Feature.DISCARD, Feature.WRITE_ZEROES))
        for kind in (Request.DISCARD, Request.WRITE_ZEROES):
            out = header(kind) + ranges((0, 8, 0))
            assert await rig.request(0, out, 1) == UNSUPP


def test_zeroes_are_written_where_the_file_system_has_no_ranges(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.virtio.image._fallocate", lambda *_: False)
    with DiskImage(path) as image:
        image.write_zeroes(512, 3 << 18, unmap=False, durable=True)
        image.discard(0, 512)
    data = path.read_bytes()
    assert data[512 : 512 + (3 << 18)] == bytes(3 << 18)
    assert data[:512] != bytes(512)
    assert data[512 + (3 << 18) :].strip(b"\0")


def test_a_discarded_range_is_a_hole_where_there_can_be_holes(path: Path) -> None:
    with DiskImage(path) as image:
        mode = _KEEP_SIZE | _PUNCH_HOLE
        can = _fallocate(image.fileno(), mode, 0, 4096)
        image.discard(1 << 20, 1 << 20)
    assert path.stat().st_size == SECTORS * 512
    if can:
        assert path.read_bytes()[1 << 20 :] == bytes(1 << 20)
        assert path.stat().st_blocks <= SECTORS // 2


# Configuration


async def test_a_resize_is_told_with_a_new_generation(image: Calls) -> None:
    """R25, R28."""
    device = VirtioBlk(image)
    async with rigged(device) as rig:
        rig.start()
        before = device.config.generation
        assert struct.unpack("<Q", device.read_config(0, 8)) == (SECTORS,)
        os.truncate(image.path, SECTORS * 1024)
        assert await write(rig, SECTORS, bytes(512)) != OK
        device.resized()
        assert struct.unpack("<Q", device.read_config(0, 8)) == (2 * SECTORS,)
        assert device.config.generation > before
        assert rig.config_interrupts == 1
        assert await write(rig, SECTORS, bytes(512)) == OK


async def test_a_read_only_disk_says_so_and_is_never_written(path: Path) -> None:
    before = content(path)
    with Calls(path, read_only=True) as image:
        device = VirtioBlk(image)
        assert device.offered & bits(Feature.RO)
        assert not device.offered & bits(Feature.DISCARD, Feature.WRITE_ZEROES)
        async with rigged(device) as rig:
            rig.start()
            assert await write(rig, 0, bytes(512)) == IOERR
            for kind in (Request.DISCARD, Request.WRITE_ZEROES):
                out = header(kind) + ranges((0, 8, 0))
                assert await rig.request(0, out, 1) == IOERR
            assert await rig.request(0, header(Request.FLUSH), 1) == OK
            assert await read(rig, 0, 4) == before[:2048]
    assert content(path) == before


def test_the_layout_is_that_of_the_specification(image: Calls) -> None:
    device = VirtioBlk(image, queues=3)
    at = device.read_config
    assert device.config.size == 60
    assert struct.unpack("<IHBBI", at(12, 12)) == (126, 4, 16, 63, 512)
    assert struct.unpack("<BxH", at(32, 4)) == (1, 3)
    assert struct.unpack("<II", at(36, 8)) == (1 << 22, 16)
    assert at(56, 1) == b"\1"


# The image


def test_an_image_has_one_writer(path: Path) -> None:
    with DiskImage(path), pytest.raises(BusyError):
        DiskImage(path, read_only=True)
    with DiskImage(path, read_only=True), DiskImage(path, read_only=True):
        pass


def test_what_cannot_be_an_image_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotFoundError, match="truncate"):
        DiskImage(tmp_path / "none")
    with pytest.raises(InvalidError):
        DiskImage(tmp_path, read_only=True)
    with pytest.raises(InvalidError):
        DiskImage(Path("/dev/null"))
    if os.geteuid() != 0:
        path.chmod(0)
        with pytest.raises(PermissionDeniedError):
            DiskImage(path)


def test_a_file_that_became_shorter_reads_as_zeros(path: Path) -> None:
    with DiskImage(path) as image:
        os.truncate(path, 512)
        assert image.read(0, 1024)[512:] == bytes(512)
