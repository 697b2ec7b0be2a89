"""DMA_MAP: the guest's memory, as files or without (R50)."""

import errno
import os

import pytest

from shm import create_memfd
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command

PAGE = 4096


async def test_mapped_memory_is_the_clients_own(bench, client, memfd):
    """R50: a descriptor makes the guest's own pages reachable, both ways."""
    await client.map(0x10000, 1 << 20, memfd)
    os.pwrite(memfd, b"north", 0x123)
    assert bench.function.memory.read(0x10123, 5) == b"north"
    bench.function.memory.write(0x10200, b"south")
    assert os.pread(memfd, 5, 0x200) == b"south"
    assert bench.server.statistics().dma_maps == 1


async def test_only_what_is_mapped_is_reached(bench, client, memfd):
    """R50: one byte beyond is a fault."""
    await client.map(0x10000, PAGE, memfd)
    with pytest.raises(Exception, match="memory of the guest"):
        bench.function.memory.read(0x10000 + PAGE - 1, 2)


async def test_offset_into_the_file(bench, client, memfd):
    os.pwrite(memfd, b"here", 8 * PAGE)
    body = wire.DmaMap(3, 8 * PAGE, 0, PAGE).pack()
    await client.ask(Command.DMA_MAP, body, [memfd])
    assert bench.function.memory.read(0, 4) == b"here"


async def test_map_without_descriptor_is_accepted(bench, client):
    """QEMU maps other devices' BARs so; they cannot be reached by loads."""
    await client.map(0xFE000000, 0x40000)
    (region,) = bench.function.memory.regions()
    assert (region.addr, region.size, region.backed) == (0xFE000000, 0x40000, False)
    with pytest.raises(Exception, match="memory of the guest"):
        bench.function.memory.read(0xFE000000, 1)


async def test_read_only_map_cannot_be_written(bench, client, memfd):
    body = wire.DmaMap(wire.DmaFlag.READ, 0, 0, PAGE).pack()
    await client.ask(Command.DMA_MAP, body, [memfd])
    assert bench.function.memory.read(0, 1) == b"\0"
    with pytest.raises(Exception, match="memory of the guest"):
        bench.function.memory.write(0, b"x")


async def test_map_over_a_map_is_refused(client, memfd):
    await client.map(0x10000, 0x10000, memfd)
    for address in (0x10000, 0x8000, 0x1F000):
        body = wire.DmaMap(3, 0, address, 0x10000).pack()
        assert await client.refused(Command.DMA_MAP, body, [memfd]) == errno.EEXIST


async def test_file_shorter_than_the_range_is_refused(client, memfd):
    body = wire.DmaMap(3, PAGE, 0, 1 << 20).pack()
    assert await client.refused(Command.DMA_MAP, body, [memfd]) == errno.EINVAL


async def test_file_that_could_shrink_is_refused_and_the_option_named(client, caplog):
    """It would end the daemon by SIGBUS."""
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        body = wire.DmaMap(3, 0, 0, PAGE).pack()
        assert await client.refused(Command.DMA_MAP, body, [fd]) == errno.EPERM
    finally:
        os.close(fd)
    (line,) = [r.getMessage() for r in caplog.records if "DMA_MAP" in r.getMessage()]
    assert "seal=on" in line
    assert line.startswith("guest: DMA_MAP refused: EPERM")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(wire.DmaMap(3, 0, 0, 0), id="empty"),
        pytest.param(wire.DmaMap(3, 0, (1 << 64) - PAGE, 2 * PAGE), id="wraps"),
        pytest.param(wire.DmaMap(3, 0, 0, (1 << 64) - 1), id="huge"),
        pytest.param(wire.DmaMap(3, (1 << 64) - 1, 0, PAGE), id="offset"),
        pytest.param(wire.DmaMap(2, 0, 0, PAGE), id="not readable"),
    ],
)
async def test_impossible_maps_are_refused(bench, client, memfd, request_):
    code = await client.refused(Command.DMA_MAP, request_.pack(), [memfd])
    assert code == errno.EINVAL
    assert bench.function.memory.regions() == []
    assert bench.server.statistics().errors == 1


async def test_short_payload_and_second_descriptor_are_refused(client, memfd):
    body = wire.DmaMap(3, 0, 0, PAGE).pack()
    assert await client.refused(Command.DMA_MAP, body[:-1]) == errno.EINVAL
    fds = [memfd, memfd]
    assert await client.refused(Command.DMA_MAP, body, fds) == errno.EINVAL


async def test_no_descriptor_is_kept_whether_taken_or_refused(client, memfd, open_fds):
    before = open_fds()
    await client.map(0, PAGE, memfd)
    for _ in range(20):
        body = wire.DmaMap(3, 0, 0, PAGE).pack()
        await client.refused(Command.DMA_MAP, body, [memfd])
        await client.refused(Command.DMA_MAP, b"", [memfd])
        await client.refused(Command.DEVICE_RESET, b"", [memfd])
        await client.refused(77, b"", [memfd])
    assert open_fds() == before


async def test_pipe_is_no_memory(client):
    reader, writer = os.pipe()
    try:
        body = wire.DmaMap(3, 0, 0, PAGE).pack()
        assert await client.refused(Command.DMA_MAP, body, [reader]) == errno.EINVAL
    finally:
        os.close(reader)
        os.close(writer)


async def test_sealed_file_too_short_by_one_byte_is_refused(client):
    fd = create_memfd("odd", PAGE - 1)
    try:
        body = wire.DmaMap(3, 0, 0, PAGE).pack()
        assert await client.refused(Command.DMA_MAP, body, [fd]) == errno.EINVAL
    finally:
        os.close(fd)
