"""The disk driver over the adapter: a real daemon's bridge, a real guest's memory."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.virtio.disk import DiskError
from tests.proxy.host import until
from tests.proxy.virtio.guests import disk_of
from vbus.errors import InvalidError, PermissionDeniedError

SIZE = 4 << 20

kinds = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@kinds
async def test_what_was_written_is_read(tmp_path: Path, packed: bool) -> None:
    """R13, R12."""
    async with disk_of(tmp_path, packed=packed) as (_, disk):
        assert disk.size == SIZE
        data = os.urandom(12 << 10)
        await disk.write(4096, data)
        assert await disk.read(4096, len(data)) == data
        assert await disk.read(0, 4096) == bytes(4096)
    image = await trio.Path(tmp_path / "disk").read_bytes()
    assert image[4096 : 4096 + len(data)] == data


@kinds
async def test_many_tasks_write_and_verify(tmp_path: Path, packed: bool) -> None:
    """R13: our own little fio, with every size up to beyond one request."""
    rng = random.Random(4)
    model = bytearray(SIZE)
    region = SIZE // 8

    async def worker(number: int) -> None:
        for _ in range(40):
            size = 512 * rng.choice([1, 2, 7, 8, 64, 255, 257, 512])
            at = number * region + 512 * rng.randrange((region - size) // 512 + 1)
            if rng.random() < 0.5:
                data = rng.randbytes(size)
                model[at : at + size] = data
                await disk.write(at, data)
            else:
                assert await disk.read(at, size) == model[at : at + size]
            if rng.random() < 0.1:
                await disk.flush()

    async with disk_of(tmp_path, packed=packed, queues=2) as (_, disk):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(worker, number)
        assert await disk.read(0, SIZE) == model
    assert await trio.Path(tmp_path / "disk").read_bytes() == model


async def test_discard_zeroes_serial_and_flush(tmp_path: Path) -> None:
    async with disk_of(tmp_path, serial="vb-1") as (host, disk):
        assert await disk.serial() == "vb-1"
        await disk.write(0, b"x" * (1 << 20))
        await disk.write_zeroes(4096, 8192)
        assert await disk.read(0, 16384) == b"x" * 4096 + bytes(8192) + b"x" * 4096
        await disk.discard(1 << 19, 1 << 19)
        assert await disk.read(1 << 19, 4096) == bytes(4096)
        await disk.flush()
        device: Any = host.model.device("disk0")
        assert disk.statistics().flushes == device.statistics().io.flushes == 1


@pytest.mark.parametrize("discard", [True, False])
async def test_holes_are_made_only_where_that_is_allowed(
    tmp_path: Path, discard: bool
) -> None:
    """The attribute `discard`: without it zeroes take room, as was promised."""
    async with disk_of(tmp_path, discard=discard) as (_, disk):
        await disk.write(0, b"x" * (1 << 20))
        await disk.flush()
        await disk.write_zeroes(0, 1 << 20, unmap=True)
        await disk.flush()
        await disk.discard(1 << 20, 1 << 20)
        assert await disk.read(0, 1 << 20) == bytes(1 << 20)
    blocks = os.stat(tmp_path / "disk").st_blocks
    assert (blocks * 512 < 1 << 19) == discard


async def test_a_disk_without_a_cache_has_nothing_to_flush(tmp_path: Path) -> None:
    async with disk_of(tmp_path, cache="writethrough") as (host, disk):
        await disk.write(0, b"x" * 4096)
        await disk.flush()
        device: Any = host.model.device("disk0")
        counted = device.statistics().io
        assert (counted.writes, counted.flushes, counted.inline) == (1, 0, 0)


async def test_a_disk_grows_under_its_driver(tmp_path: Path) -> None:
    """R25: the device changes its configuration and says so."""
    async with disk_of(tmp_path) as (host, disk):
        host.model.set_attribute("disk0", "size", "8M")
        await until(lambda: disk.size == 8 << 20)
        await disk.write((8 << 20) - 512, b"e" * 512)


async def test_what_is_not_on_the_disk_is_refused(tmp_path: Path) -> None:
    async with disk_of(tmp_path) as (_, disk):
        for offset, size in ((SIZE, 512), (0, 0), (-512, 512), (100, 512), (0, 100)):
            with pytest.raises(InvalidError):
                await disk.read(offset, size)
        disk.size *= 2  # the driver is wrong about the size: the device is not
        with pytest.raises(DiskError, match="failed to in"):
            await disk.read(SIZE, 512)
        assert disk.statistics().errors == 1
        assert await disk.read(0, 512) == bytes(512)


async def test_a_read_only_disk_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"r" * 4096)
    async with disk_of(tmp_path, size=0, readonly=True) as (_, disk):
        assert await disk.read(0, 4096) == b"r" * 4096
        with pytest.raises(PermissionDeniedError):
            await disk.write(0, bytes(512))


async def test_a_cancelled_request_gives_its_memory_back(tmp_path: Path) -> None:
    async with disk_of(tmp_path) as (_, disk):
        for _ in range(200):
            with trio.CancelScope() as scope:
                scope.cancel()
                await disk.read(0, 4096)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk.read, 0, 4096)
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert await disk.read(0, SIZE) == bytes(SIZE)
