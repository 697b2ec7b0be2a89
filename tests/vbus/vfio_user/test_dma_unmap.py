"""DMA_UNMAP: what is unmapped is out of reach; ranges need match no map (R50)."""

import errno

import pytest

from vbus.errors import FaultError
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command

PAGE = 4096


async def test_unmapped_memory_is_out_of_reach_when_the_reply_comes(
    bench, client, memfd
):
    """R50."""
    await client.map(0, PAGE, memfd)
    view = bench.function.memory.view(0, PAGE)
    body = wire.DmaUnmap(0, 0, PAGE).pack()
    assert await client.ask(Command.DMA_UNMAP, body) == body
    assert not view.alive
    with pytest.raises(FaultError):
        bench.function.memory.read(0, 1)
    view.close()


async def test_range_that_matches_no_map_is_no_error(bench, client, memfd):
    """With an IOMMU, QEMU unmaps whole powers of two."""
    await client.map(0x1000, PAGE, memfd)
    await client.map(0x4000, PAGE)
    body = wire.DmaUnmap(0, 1 << 40, 1 << 40).pack()
    assert await client.ask(Command.DMA_UNMAP, body) == body
    assert len(bench.function.memory.regions()) == 2
    body = wire.DmaUnmap(0, 0, 1 << 32).pack()
    assert await client.ask(Command.DMA_UNMAP, body) == body
    assert bench.function.memory.regions() == []


async def test_everything_is_unmapped_by_the_all_flag(bench, client, memfd):
    for index in range(5):
        await client.map(index * 0x10000, PAGE, memfd)
    body = wire.DmaUnmap(wire.UnmapFlag.ALL, 0, 0).pack()
    assert await client.ask(Command.DMA_UNMAP, body) == body
    assert bench.function.memory.regions() == []


async def test_cutting_a_map_is_refused(bench, client, memfd):
    await client.map(0, 4 * PAGE, memfd)
    body = wire.DmaUnmap(0, PAGE, PAGE).pack()
    assert await client.refused(Command.DMA_UNMAP, body) == errno.EINVAL
    assert len(bench.function.memory.regions()) == 1


async def test_dirty_bitmaps_and_short_payloads_are_refused(client):
    body = wire.DmaUnmap(wire.UnmapFlag.GET_DIRTY_BITMAP, 0, PAGE).pack()
    assert await client.refused(Command.DMA_UNMAP, body) == errno.ENOTSUP
    assert await client.refused(Command.DMA_UNMAP, body[:20]) == errno.EINVAL


async def test_address_space_can_be_mapped_again_after_unmapping(bench, client, memfd):
    for _ in range(50):
        await client.map(0, PAGE, memfd)
        await client.ask(Command.DMA_UNMAP, wire.DmaUnmap(0, 0, PAGE).pack())
    counters = bench.server.statistics()
    assert (counters.dma_maps, counters.dma_unmaps) == (50, 50)
