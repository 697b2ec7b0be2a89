"""A virtqueue's device end, ring by ring, against bytes written by hand."""

import os
from array import array
from collections.abc import Iterator

import pytest

from backends.virtio.queue import QueueState, RingAddresses, VirtQueue
from shm.errors import BusyError, FaultError, InvalidError
from tests.backends.virtio.driver_ring import (
    BUFFERS,
    INDIRECT,
    NEXT,
    PACKED,
    RING,
    TABLE,
    TABLES,
    WRITE,
    Memory,
    PackedRing,
    SplitRing,
)

AREA = 0x1000


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


@pytest.fixture(params=[SplitRing, PackedRing], ids=["split", "packed"])
def ring(request: pytest.FixtureRequest, memory: Memory) -> SplitRing | PackedRing:
    made = request.param(8, INDIRECT, memory)
    assert isinstance(made, SplitRing | PackedRing)
    return made


def buffer(nth: int) -> int:
    return BUFFERS + AREA * nth


# Layout


def test_a_legacy_ring_is_one_area() -> None:
    """R20: descriptors, available ring, and on the next page the used ring."""
    at = RingAddresses.legacy(0x12, 256)
    assert at == (0x12000, 0x13000, 0x14000)
    assert RingAddresses.legacy(1, 4) == (0x1000, 0x1040, 0x2000)


@pytest.mark.parametrize("size", [0, -1, 3, 65536, 1 << 40])
def test_a_split_ring_has_a_power_of_two(memory: Memory, size: int) -> None:
    """Virtio 1.2, 2.7: at most 32768."""
    with pytest.raises(InvalidError, match="cannot have"):
        VirtQueue(memory.device, size, RingAddresses(RING, RING, RING), 0)


@pytest.mark.parametrize(
    ("features", "desc", "driver", "device"),
    [
        (0, 8, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 2),
        (PACKED, 8, 0, 0),
        (PACKED, 0, 2, 0),
        (PACKED, 0, 0, 2),
    ],
)
def test_parts_are_aligned(
    memory: Memory, features: int, desc: int, driver: int, device: int
) -> None:
    at = RingAddresses(RING + desc, RING + 0x100 + driver, RING + 0x200 + device)
    with pytest.raises(InvalidError, match="misaligned"):
        VirtQueue(memory.device, 8, at, features)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("features", [0, PACKED])
def test_parts_are_memory(memory: Memory, features: int, part: int) -> None:
    """A part that ends outside memory is refused when the queue is opened."""
    at = [RING, RING + 0x100, RING + 0x200]
    at[part] = memory.size - (2 if features and part else 0)
    at[part] &= ~3 if part else ~15
    if features and part:
        at[part] = memory.size
    with pytest.raises(FaultError):
        VirtQueue(memory.device, 8, RingAddresses(*at), features)


def test_what_the_device_only_reads_may_be_read_only(memory: Memory) -> None:
    """The used ring may not, nor the packed descriptors."""
    memory.device.unmap(0, memory.size)
    memory.device.map(0, 0x11000, memory.fd, 0, writable=False)
    memory.device.map(0x11000, 0x1000, memory.fd, 0x11000)
    VirtQueue(memory.device, 8, RingAddresses(RING, RING + 0x100, 0x11000), 0)
    with pytest.raises(FaultError):
        VirtQueue(memory.device, 8, RingAddresses(RING, RING + 0x100, RING + 0x200), 0)
    with pytest.raises(FaultError):
        VirtQueue(memory.device, 8, RingAddresses(RING, RING + 0x100, 0x11000), PACKED)


# Chains


def test_a_chain_of_several_buffers(ring: SplitRing | PackedRing) -> None:
    """Readable bytes come together, and so do the writable ones."""
    queue = ring.queue()
    ring.memory.guest.write(buffer(0), b"abc")
    ring.memory.guest.write(buffer(1), b"defg")
    ring.chain(
        (buffer(0), 3, NEXT, 1),
        (buffer(1), 4, NEXT, 2),
        (buffer(2), 5, NEXT | WRITE, 3),
        (buffer(3), 6, WRITE, 0),
    )
    [chain] = queue.pop_batch(8)
    assert (chain.readable, chain.writable) == (7, 11)
    assert chain.segments == [
        (buffer(0), 3, False),
        (buffer(1), 4, False),
        (buffer(2), 5, True),
        (buffer(3), 6, True),
    ]
    assert [chain.read(), chain.read(2), chain.read(2, 3)] == [
        b"abcdefg",
        b"cdefg",
        b"cde",
    ]
    into = bytearray(4)
    chain.read_into(into, 1)
    assert into == b"bcde"
    chain.write(3, b"12345")
    assert ring.memory.guest.read(buffer(2), 5) == b"\0\0\x0012"
    assert ring.memory.guest.read(buffer(3), 6) == b"345\0\0\0"
    assert queue.pop_batch(8) == []


def test_a_split_ring_gets_its_used_elements(memory: Memory) -> None:
    """In the order in which chains were given back, with their heads."""
    ring = SplitRing(4, memory=memory)
    queue = ring.queue()
    ring.chain((buffer(0), 4, WRITE, 0), first=3)
    ring.chain((buffer(0), 9, WRITE, 0), first=1)
    first, second = queue.pop_batch(8)
    assert ring.used() == []
    queue.push_batch([(second, 9), (first, 0)])
    assert ring.used() == [(1, 9), (3, 0)]


def test_a_packed_ring_gets_its_used_descriptors(memory: Memory) -> None:
    """At the place of the oldest chain, in the order given back, lap by lap."""
    ring = PackedRing(3, memory=memory)
    queue = ring.queue()
    for lap in (True, False, True):
        ring.chain((buffer(0), 4, NEXT, 0), (buffer(1), 4, WRITE, 7))
        ring.chain((buffer(0), 9, WRITE, 5))
        first, second = queue.pop_batch(8)
        queue.push_batch([(second, 9), (first, 0)])
        assert ring.used(0, lap) == (5, 9)
        assert ring.used(1, lap) == (7, 0)
        marks = [memory.get("H", RING + 16 * n + 14)[0] & WRITE for n in range(2)]
        assert marks == [WRITE, 0]  # was anything written?
        assert queue.pop_batch(8) == []


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_indirect_table(ring: SplitRing | PackedRing, before: int) -> None:
    """2.7.5.3: any number of plain descriptors, then one that names a table."""
    queue = ring.queue()
    ring.memory.guest.write(buffer(0), b"abcdefgh")
    size = ring.table([(buffer(0), 3, NEXT, 1), (buffer(1), 4, WRITE, 0)])
    plain = [(buffer(0) + 4, 1, NEXT, n + 1) for n in range(before)]
    ring.chain(*plain, (TABLES, size, TABLE | WRITE, before))
    [chain] = queue.pop_batch(8)
    assert (chain.read(), chain.writable) == (b"e" * before + b"abc", 4)
    queue.push(chain, 0)


def test_a_packed_table_has_no_flag_but_write(memory: Memory) -> None:
    """2.8.7: its entries follow each other, other flags and ids are ignored."""
    ring = PackedRing(4, INDIRECT, memory)
    queue = ring.queue()
    size = ring.table(
        [
            (buffer(0), 3, 0, 77),
            (buffer(1), 4, TABLE, 2),
            (buffer(2), 5, WRITE | NEXT, 0),
        ]
    )
    ring.chain((TABLES, size, TABLE, 3))
    [chain] = queue.pop_batch(8)
    assert (chain.readable, chain.writable, chain.id) == (7, 5, 3)


def test_a_buffer_over_a_border_of_regions() -> None:
    """Memory that came in pieces is one chain all the same."""
    memory = Memory(borders=[buffer(1), buffer(2)])
    ring = SplitRing(4, memory=memory)
    queue = ring.queue()
    memory.guest.write(buffer(1) - 2, b"ab" + b"-" * AREA + b"yz")
    ring.chain((buffer(1) - 2, AREA + 4, NEXT, 1), (buffer(2) - 3, 6, WRITE, 0))
    [chain] = queue.pop_batch(1)
    assert chain.read() == b"ab" + b"-" * AREA + b"yz"
    chain.write(1, b"12345")
    assert memory.guest.read(buffer(2) - 3, 6) == b"-12345"
    memory.close()


def test_the_indices_of_a_split_ring_wrap(memory: Memory) -> None:
    """They run freely in 16 bits: more than 65536 chains."""
    ring = SplitRing(4, memory=memory)
    queue = ring.queue(QueueState())
    ring.describe(2, (buffer(0), 4, WRITE, 0))
    for n in range(4):
        memory.put("H", ring.at.driver + 4 + 2 * n, 2)
    for count in range(4, 0x10000 + 40, 4):
        ring.set_index(count & 0xFFFF)
        chains = queue.pop_batch(8)
        assert len(chains) == 4
        queue.push_batch([(each, 1) for each in chains])
        assert memory.get("H", ring.at.device + 2) == (count & 0xFFFF,)


def test_a_batch_has_a_limit(ring: SplitRing | PackedRing) -> None:
    queue = ring.queue()
    for n in range(5):
        ring.chain((buffer(n), n + 1, WRITE, n), **first(ring, n))
    sizes = [[each.writable for each in queue.pop_batch(limit)] for limit in (0, 2, 9)]
    assert sizes == [[], [1, 2], [3, 4, 5]]


def first(ring: SplitRing | PackedRing, n: int) -> dict[str, int]:
    return {"first": n} if isinstance(ring, SplitRing) else {}


# Misuse


def test_what_is_given_back_is_out_and_has_room(ring: SplitRing | PackedRing) -> None:
    """All of a batch is given back, or none."""
    queue = ring.queue()
    ring.chain((buffer(0), 4, WRITE, 0))
    ring.chain((buffer(1), 4, WRITE, 1), **first(ring, 1))
    one, two = queue.pop_batch(8)
    with pytest.raises(InvalidError, match="room for 4"):
        queue.push_batch([(one, 4), (two, 5)])
    with pytest.raises(InvalidError, match="before"):
        queue.push_batch([(one, 4), (one, 4)])
    with pytest.raises(TypeError):
        queue.push_batch([(one, 4), (None, 4)])  # type: ignore[list-item]
    assert queue.in_flight == 2
    queue.push_batch([(two, 4), (one, 1)])
    with pytest.raises(InvalidError, match="before"):
        queue.push(one, 0)
    with pytest.raises(InvalidError, match="given back"):
        one.write(0, b"x")
    assert (one.writable, queue.in_flight) == (4, 0)


def test_a_chain_belongs_to_its_queue(memory: Memory) -> None:
    ring = SplitRing(4, memory=memory)
    queue, other = ring.queue(), ring.queue()
    ring.chain((buffer(0), 4, WRITE, 0))
    [chain] = queue.pop_batch(1)
    with pytest.raises(InvalidError, match="another"):
        other.push(chain, 0)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 5), (4, 1), (5, 0), (1 << 63, 1 << 63)]
)
def test_a_copy_stays_inside_its_part(
    ring: SplitRing | PackedRing, offset: int, size: int
) -> None:
    queue = ring.queue()
    ring.chain((buffer(0), 4, NEXT, 1), (buffer(1), 4, WRITE, 0))
    [chain] = queue.pop_batch(1)
    with pytest.raises(InvalidError):
        chain.read(offset, size)
    with pytest.raises(InvalidError):
        chain.preadv(0, 0, offset, size)
    if size < 10:
        with pytest.raises(InvalidError):
            chain.write(offset, bytes(size))


# Batches


def test_gather_and_scatter(ring: SplitRing | PackedRing) -> None:
    """Back to back, as many as fit; the first that does not fit is an error."""
    queue = ring.queue()
    for n, word in enumerate((b"one", b"three", b"of")):
        ring.memory.guest.write(buffer(n), word)
        ring.chain(
            (buffer(n), len(word), NEXT, 2 * n + 1),
            (buffer(n) + 8, 8, WRITE, 0),
            **first(ring, 2 * n),
        )
    chains = queue.pop_batch(8)
    into, sizes = bytearray(64), array("I", bytes(4 * 8))
    assert queue.gather(chains, into, sizes) == 3
    assert (bytes(into[:10]), list(sizes[:3])) == (b"onethreeof", [3, 5, 2])
    assert queue.gather(chains, bytearray(9), sizes) == 2
    assert queue.gather(chains, into, memoryview(sizes)[:1]) == 1
    with pytest.raises(InvalidError, match="left in the buffer"):
        queue.gather(chains, bytearray(2), sizes)
    assert queue.scatter(chains, b"abcdef", array("I", [1, 2, 3])) == 3
    words = [ring.memory.guest.read(buffer(n) + 8, 4) for n in range(3)]
    assert words == [b"a\0\0\0", b"bc\0\0", b"def\0"]
    with pytest.raises(InvalidError, match="8 writable"):
        queue.scatter(chains, bytes(9), array("I", [9]))


# Files


def split_chain(memory: Memory, count: int, size: int, flags: int) -> VirtQueue:
    """One chain of `count` buffers of `size` bytes, each `2 * size` after the last."""
    ring = SplitRing(2048, INDIRECT, memory)
    ring.at = RingAddresses(0x80000, 0x90000, 0xA0000)
    for n in range(count):
        more = NEXT if n + 1 < count else 0
        ring.describe(n, (BUFFERS + 2 * size * n, size, flags | more, n + 1))
    ring.offer(0)
    return ring.queue()


@pytest.mark.parametrize("count", [1, 3, 1024, 1500])
def test_files_without_a_copy_of_ours(memory: Memory, count: int) -> None:
    """Long chains go in several calls; each byte at its place."""
    fd = os.memfd_create("file")
    data = os.urandom(5 * count)
    os.pwrite(fd, b"#" * 10 + data, 0)
    [chain] = split_chain(memory, count, 5, WRITE).pop_batch(1)
    assert chain.preadv(fd, 10) == 5 * count
    places = range(BUFFERS, BUFFERS + 10 * count, 10)
    assert b"".join(memory.guest.read(at, 5) for at in places) == data

    [chain] = split_chain(memory, count, 5, 0).pop_batch(1)
    assert chain.pwritev(fd, 3) == 5 * count
    assert os.pread(fd, 5 * count, 3) == data
    assert chain.pwritev(fd, 3, 2, 2) == 2
    assert os.pread(fd, 2, 3) == data[2:4]
    os.close(fd)


def test_a_short_file_is_a_short_transfer(memory: Memory) -> None:
    fd = os.memfd_create("file")
    os.pwrite(fd, b"abcdefg", 0)
    [chain] = split_chain(memory, 3, 5, WRITE).pop_batch(1)
    assert [chain.preadv(fd, 0), chain.preadv(fd, 7), chain.preadv(fd, 0, 14)] == [
        7,
        0,
        1,
    ]
    with pytest.raises(InvalidError):
        chain.preadv(fd, -1)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        chain.preadv(fd, 0)


def test_a_datagram_is_one_call(memory: Memory) -> None:
    """R27: what a TAP takes or gives is one frame, whatever its buffers."""
    read, write = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)  # a pipe of packets
    memory.guest.write(BUFFERS, b"abcde-----fghij-----klmno")
    [chain] = split_chain(memory, 3, 5, 0).pop_batch(1)
    assert chain.writev(write, 1) == 14
    assert os.read(read, 100) == b"bcdefghijklmno"
    with pytest.raises(BlockingIOError):
        os.read(read, 1)

    [chain] = split_chain(memory, 3, 5, WRITE).pop_batch(1)
    with pytest.raises(BlockingIOError):
        chain.readv(read)
    os.write(write, b"ABCDEFG")
    assert chain.readv(read, 2, 6) == 6
    assert memory.guest.read(BUFFERS, 14) == b"abABC-----DEFi"
    [chain] = split_chain(memory, 1025, 1, 0).pop_batch(1)
    with pytest.raises(InvalidError, match="pieces"):
        chain.writev(write)
    assert chain.writev(write, 1) == 1024
    os.close(read)
    os.close(write)


# Save and restore


def test_a_queue_goes_on_where_it_was_saved(ring: SplitRing | PackedRing) -> None:
    queue = ring.queue()
    for n in range(3):
        ring.chain((buffer(n), n + 1, WRITE, n), **first(ring, n))
    chains = queue.pop_batch(2)
    with pytest.raises(BusyError, match="still out"):
        queue.save()
    queue.push_batch([(each, 0) for each in chains])
    saved = queue.save()
    assert saved == QueueState(2, 2, True, True)
    again = ring.queue(saved)
    assert [each.writable for each in again.pop_batch(8)] == [3]
    assert again.should_notify() is True


def test_a_state_of_another_ring_is_refused(memory: Memory) -> None:
    split, packed = SplitRing(4, memory=memory), PackedRing(4, memory=memory)
    with pytest.raises(InvalidError, match="saved state"):
        split.queue(QueueState(5, 5))
    for state in (QueueState(4, 0), QueueState(0, 4)):
        with pytest.raises(InvalidError, match="saved state"):
            packed.queue(state)


def test_statistics(ring: SplitRing | PackedRing) -> None:
    queue = ring.queue()
    ring.chain((buffer(0), 4, WRITE, 0))
    queue.push(queue.pop_batch(1)[0], 0)
    queue.should_notify()
    seen = queue.statistics()
    assert (seen.size, seen.popped, seen.pushed, seen.notified) == (8, 1, 1, 1)
    assert (seen.suppressed, seen.broken, queue.packed) == (
        0,
        None,
        isinstance(ring, PackedRing),
    )
