"""What a client may not reach: canaries stand beside its memory (R50, issue 3).

The client's file has a canary before and behind the part it maps, and a read-only
range, a range without a descriptor and one just unmapped lie beside it.
"""

import os
import random
from array import array
from functools import partial

import pytest

from ioq import Index, Ring, ring_size
from ioq.errors import RingFault
from shm import Locality, create_memfd
from vbus.errors import FaultError
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command

PAGE = 4096
RAM, ROM, HOLE, GONE = 0x10000, 0x20000, 0x30000, 0x40000
SIZE = 4 * PAGE
CANARY = b"canary!!" * (PAGE // 8)


class Guest:
    """A client with ranges of every kind, and the file they come from."""

    def __init__(self, bench, client, fd):
        self.bench, self.client, self.fd = bench, client, fd
        self.memory = bench.function.memory

    async def set_up(self):
        for at in (0, SIZE + PAGE, 2 * SIZE + 2 * PAGE):
            os.pwrite(self.fd, CANARY, at)
        await self.client.map(HOLE, SIZE)
        for address, flags, offset in (
            (RAM, 3, PAGE),
            (ROM, wire.DmaFlag.READ, SIZE + 2 * PAGE),
            (GONE, 3, 2 * SIZE + 3 * PAGE),
        ):
            body = wire.DmaMap(flags, offset, address, SIZE).pack()
            await self.client.ask(Command.DMA_MAP, body, [self.fd])
        await self.unmap(GONE)

    async def unmap(self, address):
        body = wire.DmaUnmap(0, address, SIZE).pack()
        assert await self.client.ask(Command.DMA_UNMAP, body) == body

    def check(self):
        """No canary was written, nor the ROM, nor what was unmapped."""
        for at in (0, SIZE + PAGE, 2 * SIZE + 2 * PAGE):
            assert os.pread(self.fd, PAGE, at) == CANARY
        assert os.pread(self.fd, SIZE, SIZE + 2 * PAGE) == bytes(SIZE)
        assert os.pread(self.fd, SIZE, 2 * SIZE + 3 * PAGE) == bytes(SIZE)


@pytest.fixture
async def guest(bench, client):
    fd = create_memfd("guest", 16 * PAGE)
    guest = Guest(bench, client, fd)
    await guest.set_up()
    yield guest
    guest.check()
    os.close(fd)


OUTSIDE = {
    "before the memory": (RAM - 1, 1),
    "first byte before it": (RAM - 1, 2),
    "behind it": (RAM + SIZE, 1),
    "last byte behind it": (RAM + SIZE - 1, 2),
    "no descriptor": (HOLE, 8),
    "unmapped": (GONE, 8),
    "top of the addresses": ((1 << 64) - 8, 8),
    "wrapping": ((1 << 64) - 8, 16),
    "all of it": (RAM, 1 << 32),
}


@pytest.mark.parametrize("at", OUTSIDE.values(), ids=OUTSIDE)
async def test_nothing_outside_the_memory_is_reached(guest, at):
    """R50: not a byte, also when the first or last byte of a range is memory."""
    address, size = at
    before = os.pread(guest.fd, SIZE, PAGE)
    size_written = min(size, 2 * SIZE)
    with pytest.raises(FaultError):
        guest.memory.read(address, size_written)
    with pytest.raises(FaultError):
        guest.memory.write(address, b"x" * size_written)
    with pytest.raises(FaultError):
        guest.memory.view(address, size)
    assert os.pread(guest.fd, SIZE, PAGE) == before  # all or nothing


@pytest.mark.parametrize("address", [ROM, ROM + SIZE - 8, ROM + 1])
async def test_a_rom_is_read_but_never_written(guest, address):
    """R50."""
    assert guest.memory.read(address, 8 if address != ROM + 1 else 4) is not None
    with pytest.raises(FaultError):
        guest.memory.write(address, b"x" * 8)
    with pytest.raises(FaultError):
        guest.memory.view(address, 8)


@pytest.mark.parametrize(
    ("target", "write"),
    [
        *((ROM, True), (HOLE, True), (GONE, True), (RAM - 8, True)),
        *((HOLE, False), (GONE, False), (RAM + SIZE - 8, False)),
    ],
)
async def test_a_descriptor_that_points_there_faults_the_ring_alone(
    guest, target, write
):
    """R50: a backend that follows it writes nothing at all and gets an error."""
    view = guest.memory.view(RAM, ring_size(4))
    Ring.format(view, 4)
    ring = Ring(view, guest.memory, Locality.NORTH, lambda: None)
    ring.push([(1, target, 64)], index=Index.VALID if write else Index.INUSE)
    south = Ring(view, guest.memory, Locality.SOUTH, lambda: None)
    payload = bytearray(64)
    if write:
        follow = partial(south.produce, b"x" * 64, 64)
    else:
        follow = partial(south.consume, payload, array("I", [0]), 1)
    with pytest.raises(RingFault, match="buffer-address"):
        follow()
    assert payload == bytes(64)


async def test_random_accesses_agree_with_the_table_of_ranges(guest):
    """R50: a model that knows only the ranges; the canaries are checked at the end."""
    noise = random.Random(1)
    for _ in range(5000):
        address = noise.choice((RAM, ROM, HOLE, GONE)) + noise.randrange(-64, SIZE + 64)
        size = noise.choice((1, 7, 64, PAGE))
        inside = [
            start <= address and address + size <= start + SIZE for start in (RAM, ROM)
        ]
        for write, allowed in ((False, any(inside)), (True, inside[0])):
            try:
                if write:
                    guest.memory.write(address, b"w" * size)
                else:
                    assert b"canary" not in guest.memory.read(address, size)
            except FaultError:
                assert not allowed
            else:
                assert allowed


async def test_memory_unmapped_between_two_pieces_of_a_transfer(guest):
    """A backend that holds a view sees it dead, and never a new range's memory."""
    view = guest.memory.view(RAM, SIZE)
    view.write(0, b"before")
    await guest.unmap(RAM)
    other = create_memfd("other", SIZE)
    try:
        await guest.client.map(RAM, SIZE, other)
        with pytest.raises(FaultError):
            view.write(0, b"after!")
        with pytest.raises(FaultError):
            view.read(0, 6)
        assert os.pread(other, 6, 0) == bytes(6)
        assert os.pread(guest.fd, 6, PAGE) == b"before"
    finally:
        view.close()
        os.close(other)


# Memory that came without descriptors


async def write_register(client):
    await client.write(0, 0, b"\0\0\0\0")


async def test_unshared_memory_is_told_once_and_counted(bench, client, caplog):
    """The line names QEMU's option; the function is served on."""
    await client.map(0, 64 << 20)
    for _ in range(3):
        await write_register(client)
    told = [line for line in caplog.messages if "share=on" in line]
    assert len(told) == 1
    assert "memory-backend-memfd" in told[0]
    assert bench.server.statistics().unbacked_maps == 1
    with pytest.raises(FaultError):
        bench.function.memory.read(0x1000, 8)


async def test_other_devices_ranges_beside_shared_memory_are_told_nothing(
    bench, client, memfd, caplog
):
    await client.map(0xFE000000, 0x4000)  # the first may well be such a range
    await client.map(0, 1 << 20, memfd)
    await write_register(client)
    assert not [line for line in caplog.messages if "share=on" in line]


async def test_what_a_client_does_is_counted_from_its_attach(bench, client, memfd):
    """R40: accesses of configuration space apart from the others; maps and resets."""
    await client.map(0, 1 << 20, memfd)
    await client.read(7, 0, 4)
    await write_register(client)
    await client.ask(Command.DEVICE_RESET)
    counted = bench.server.client_statistics()
    assert (counted.config_reads, counted.config_writes) == (1, 0)
    assert (counted.region_reads, counted.region_writes) == (0, 1)
    assert (counted.dma_maps, counted.unbacked_maps, counted.resets) == (1, 0, 1)
    await client.leave(bench.server)
    assert bench.server.client_statistics() == counted  # still the last one's
    await bench.attach()
    assert bench.server.client_statistics().config_reads == 0
    assert bench.server.statistics().region_reads[7] == 1
