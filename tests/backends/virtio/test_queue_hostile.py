"""A driver that breaks the rules breaks its queue, and nothing else (R12)."""

from collections.abc import Callable, Iterator

import pytest

from backends.virtio.errors import VirtQueueError
from backends.virtio.queue import RingAddresses
from shm.errors import FaultError
from tests.backends.virtio.driver_ring import (
    AVAIL,
    BUFFERS,
    EVENT_IDX,
    INDIRECT,
    NEXT,
    RING,
    TABLE,
    TABLES,
    WRITE,
    Descriptor,
    Memory,
    PackedRing,
    RawRing,
    SplitRing,
)

SIZE = 8
AT = BUFFERS
GOOD = (AT, 16, WRITE, 0)
TOP = (1 << 64) - 16


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def endless(_: RawRing) -> list[Descriptor]:
    return [(AT, 1, NEXT, (n + 1) % SIZE) for n in range(SIZE)]


def table(
    *descriptors: Descriptor, size: int | None = None, flags: int = 0
) -> Callable[[RawRing], list[Descriptor]]:
    """One descriptor that names these, which lie in a table."""

    def make(ring: RawRing) -> list[Descriptor]:
        length = ring.table(descriptors)
        return [(TABLES, length if size is None else size, TABLE | flags, 0)]

    return make


def chain(*descriptors: Descriptor) -> Callable[[RawRing], list[Descriptor]]:
    return lambda _: list(descriptors)


BAD_CHAINS: dict[str, tuple[str, Callable[[RawRing], list[Descriptor]]]] = {
    "loop": ("chain-length", endless),
    "no bytes": ("buffer-empty", chain((AT, 0, 0, 0))),
    "no bytes at the end": ("buffer-empty", chain((AT, 4, NEXT, 1), (AT, 0, WRITE, 0))),
    "readable after writable": (
        "buffer-order",
        chain((AT, 4, NEXT | WRITE, 1), (AT, 4, 0, 0)),
    ),
    "behind memory": ("buffer-address", chain((1 << 40, 4, 0, 0))),
    "partly behind memory": ("buffer-address", chain((0xFFFFE, 4, 0, 0))),
    "wraps": ("buffer-address", chain((TOP, 32, 0, 0))),
    "last of several": ("buffer-address", chain((AT, 4, NEXT, 1), (1 << 40, 4, 0, 0))),
    "4 GiB": (
        "chain-bytes",
        chain((AT, (1 << 32) - 1, NEXT, 1), (AT, 1, 0, 0)),
    ),
    "table: nested": ("indirect-nested", table((TABLES, 16, TABLE, 0))),
    "table: and next": ("indirect-next", table(GOOD, flags=NEXT)),
    "table: empty": ("indirect-size", table(size=0)),
    "table: cut": ("indirect-size", table(GOOD, size=17)),
    "table: half": ("indirect-size", table(GOOD, size=8)),
    "table: too long": ("indirect-size", table(GOOD, size=16 * (SIZE + 1))),
    "table: not memory": ("indirect-address", chain((1 << 40, 16, TABLE, 0))),
    "table: wraps": ("indirect-address", chain((TOP, 32, TABLE, 0))),
    "table: empty buffer": ("buffer-empty", table((AT, 0, 0, 0))),
    "table: wrong order": (
        "buffer-order",
        table((AT, 4, NEXT | WRITE, 1), (AT, 4, 0, 0)),
    ),
    "table: loop": (
        "chain-length",
        table((AT, 4, NEXT, 1), (AT, 4, NEXT, 0)),
    ),
    "table: next outside": ("next-range", table((AT, 4, NEXT, 1))),
    "table: next far outside": ("next-range", table((AT, 4, NEXT, 0xFFFF))),
    "table: with chain before it too long": (
        "chain-length",
        lambda ring: [
            *((AT, 1, NEXT, n + 1) for n in range(SIZE - 1)),
            (TABLES, ring.table([(AT, 1, NEXT, 1), (AT, 1, 0, 0)]), TABLE, 0),
        ],
    ),
}
ONLY_SPLIT = {"table: nested", "table: loop", "table: next outside"} | {
    "table: next far outside"
}


def refuse(ring: RawRing, reason: str) -> None:
    """It breaks, stays broken, and says why each time."""
    queue = ring.queue()
    for _ in range(2):
        with pytest.raises(VirtQueueError, match=rf"\({reason}\)") as caught:
            queue.pop_batch(8)
        assert caught.value.reason == queue.broken == reason
    assert queue.enable_kicks() is True  # look again: and be told
    assert (queue.in_flight, queue.should_notify()) == (0, False)


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_a_bad_chain_breaks_a_split_ring(memory: Memory, name: str) -> None:
    reason, make = BAD_CHAINS[name]
    ring = SplitRing(SIZE, INDIRECT, memory)
    ring.chain(*make(ring))
    refuse(ring, reason)


@pytest.mark.parametrize("name", sorted(BAD_CHAINS.keys() - ONLY_SPLIT))
def test_a_bad_chain_breaks_a_packed_ring(memory: Memory, name: str) -> None:
    reason, make = BAD_CHAINS[name]
    ring = PackedRing(SIZE, INDIRECT, memory)
    ring.chain(*make(ring))
    refuse(ring, reason)


@pytest.mark.parametrize("kind", [SplitRing, PackedRing])
def test_a_table_must_be_negotiated(
    memory: Memory, kind: type[SplitRing | PackedRing]
) -> None:
    ring = kind(SIZE, 0, memory)
    ring.chain((TABLES, ring.table([GOOD]), TABLE, 0))
    refuse(ring, "indirect-refused")


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_a_head_outside_the_table(memory: Memory, head: int) -> None:
    ring = SplitRing(SIZE, 0, memory)
    ring.offer(head)
    refuse(ring, "head-range")


@pytest.mark.parametrize("following", [SIZE, 0xFFFF])
def test_a_next_outside_the_table(memory: Memory, following: int) -> None:
    ring = SplitRing(SIZE, 0, memory)
    ring.chain((AT, 4, NEXT, following))
    refuse(ring, "next-range")


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_index_that_jumps(memory: Memory, index: int) -> None:
    """More became available than the ring holds, or it went back."""
    ring = SplitRing(SIZE, 0, memory)
    ring.describe(0, GOOD)
    ring.set_index(index)
    refuse(ring, "avail-index")


def test_what_is_in_flight_counts_as_available(memory: Memory) -> None:
    """No driver gets more chains into the device than its ring holds."""
    ring = SplitRing(SIZE, 0, memory)
    ring.describe(0, GOOD)
    ring.set_index(SIZE)
    queue = ring.queue()
    assert len(queue.pop_batch(64)) == SIZE
    ring.set_index(SIZE + 1)
    with pytest.raises(VirtQueueError, match="avail-index"):
        queue.pop_batch(1)


def test_what_is_in_flight_is_not_available_again(memory: Memory) -> None:
    """A packed descriptor that is out cannot be made available on the next lap."""
    ring = PackedRing(2, 0, memory)
    ring.chain(GOOD)
    ring.chain(GOOD)
    queue = ring.queue()
    assert len(queue.pop_batch(8)) == 2
    ring.chain(GOOD)
    with pytest.raises(VirtQueueError, match="chain-length"):
        queue.pop_batch(8)


def test_a_packed_list_does_not_reach_into_what_is_in_flight(memory: Memory) -> None:
    ring = PackedRing(3, 0, memory)
    ring.chain(GOOD)
    queue = ring.queue()
    assert len(queue.pop_batch(8)) == 1
    ring.chain((AT, 1, NEXT, 0), (AT, 1, NEXT, 0), (AT, 1, WRITE, 0))
    with pytest.raises(VirtQueueError, match="chain-length"):
        queue.pop_batch(8)


def test_read_only_memory_cannot_be_written(memory: Memory) -> None:
    memory.device.unmap(0, memory.size)
    memory.device.map(0, BUFFERS, memory.fd)
    memory.device.map(BUFFERS, 0x1000, memory.fd, BUFFERS, writable=False)
    ring = SplitRing(SIZE, 0, memory)
    ring.chain((AT, 4, 0, 0))
    queue = ring.queue()
    [chain] = queue.pop_batch(1)
    assert chain.read() == bytes(4)
    ring.chain((AT, 4, WRITE, 0))
    with pytest.raises(VirtQueueError, match="buffer-address"):
        queue.pop_batch(1)


def test_borders_are_bounded(memory: Memory) -> None:
    """R12: a chain over very many small regions costs the guest its queue, not us."""
    memory.device.unmap(0, memory.size)
    memory.device.map(0, BUFFERS, memory.fd)
    for n in range(1100):
        memory.device.map(BUFFERS + n, 1, memory.fd, 0)
    ring = SplitRing(SIZE, 0, memory)
    ring.chain((AT, 1024 + SIZE, 0, 0))
    queue = ring.queue()
    assert len(queue.pop_batch(1)) == 1
    ring.chain((AT, 1025 + SIZE, 0, 0))
    with pytest.raises(VirtQueueError, match="buffer-pieces"):
        queue.pop_batch(1)


@pytest.mark.parametrize("kind", [SplitRing, PackedRing])
def test_chains_before_a_bad_one_are_good(
    memory: Memory, kind: type[SplitRing | PackedRing]
) -> None:
    """They come without the exception, and are given back although it is broken."""
    ring = kind(SIZE, 0, memory)
    ring.chain(GOOD)
    if isinstance(ring, SplitRing):
        ring.chain((AT, 0, 0, 0), first=1)
    else:
        ring.chain((AT, 0, 0, 0))
    queue = ring.queue()
    [chain] = queue.pop_batch(8)
    assert queue.broken == "buffer-empty"
    queue.push(chain, 3)
    assert queue.should_notify() is True
    if isinstance(ring, SplitRing):
        assert ring.used() == [(0, 3)]
    else:
        assert ring.used(0, True) == (0, 3)


def test_a_chain_keeps_its_shape(memory: Memory) -> None:
    """Descriptors are read once: changing them later changes nothing."""
    ring = SplitRing(SIZE, INDIRECT, memory)
    memory.guest.write(AT, b"data")
    ring.chain((TABLES, ring.table([(AT, 4, 0, 0)]), TABLE, 0))
    [chain] = ring.queue().pop_batch(1)
    ring.table([(1 << 40, 1 << 31, WRITE, 0)])
    ring.describe(0, (1 << 40, 1 << 31, WRITE | NEXT, 0))
    assert (chain.read(), chain.writable) == (b"data", 0)


@pytest.mark.parametrize("kind", [SplitRing, PackedRing])
def test_memory_unmapped_under_a_chain(
    memory: Memory, kind: type[SplitRing | PackedRing]
) -> None:
    """Every use of the chain is a fault; it can be given back; the queue lives on."""
    memory.device.unmap(0, memory.size)
    memory.device.map(0, BUFFERS, memory.fd)
    memory.device.map(BUFFERS, 0x1000, memory.fd, BUFFERS)
    ring = kind(SIZE, 0, memory)
    ring.chain((AT, 4, NEXT, 1), (AT + 8, 4, WRITE, 0))
    queue = ring.queue()
    [chain] = queue.pop_batch(1)
    memory.device.unmap(BUFFERS, 0x1000)
    for use in (
        chain.read,
        lambda: chain.write(0, b"x"),
        lambda: chain.read_into(bytearray(1)),
        lambda: chain.readv(memory.fd),
        lambda: chain.writev(memory.fd),
        lambda: chain.preadv(memory.fd, 0),
        lambda: chain.pwritev(memory.fd, 0),
    ):
        with pytest.raises(FaultError, match="unmapped"):
            use()
    assert queue.broken is None
    memory.device.map(BUFFERS, 0x1000, memory.fd, BUFFERS + 0x1000)
    memory.guest.write(BUFFERS + 0x1000, b"new ")
    assert chain.read() == b"new "  # what lies at that address now
    memory.device.unmap(BUFFERS, 0x1000)
    queue.push(chain, 0)
    assert (queue.broken, queue.in_flight) == (None, 0)


def test_memory_that_comes_back_in_other_pieces(memory: Memory) -> None:
    """The chain is found again, its parts where they were."""
    ring = SplitRing(SIZE, 0, memory)
    high = BUFFERS + 0x1000
    memory.device.unmap(0, memory.size)
    memory.device.map(0, BUFFERS, memory.fd)
    memory.device.map(BUFFERS, 0x4000, memory.fd, BUFFERS)
    memory.guest.write(high - 2, b"abcd")
    ring.chain((high - 2, 4, NEXT, 1), (high + 0xFFE, 4, WRITE, 0))
    [chain] = ring.queue().pop_batch(1)
    memory.device.unmap(BUFFERS, 0x4000)
    for at in range(BUFFERS, BUFFERS + 0x4000, 0x1000):
        memory.device.map(at, 0x1000, memory.fd, at)
    chain.write(0, b"wxyz")
    assert chain.read() == b"abcd"
    assert memory.guest.read(high + 0xFFE, 4) == b"wxyz"
    assert memory.guest.read(high - 2, 4) == b"abcd"


@pytest.mark.parametrize("kind", [SplitRing, PackedRing])
@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_the_ring_itself_unmapped(
    memory: Memory, kind: type[SplitRing | PackedRing], features: int
) -> None:
    """Every operation says so; none touches the memory."""
    ring = kind(SIZE, features, memory)
    ring.chain(GOOD)
    queue = ring.queue()
    [chain] = queue.pop_batch(1)
    memory.device.unmap(0, memory.size)
    queue.disable_kicks()
    assert queue.enable_kicks() is True
    assert (queue.broken, queue.should_notify()) == ("ring-unmapped", False)
    with pytest.raises(VirtQueueError, match="ring-unmapped"):
        queue.push(chain, 0)
    with pytest.raises(VirtQueueError, match="ring-unmapped"):
        queue.push_batch([(chain, 0)])
    with pytest.raises(VirtQueueError, match="ring-unmapped"):
        queue.pop_batch(1)
    memory.device.close()
    with pytest.raises(FaultError):
        chain.write(0, b"x")


def test_a_broken_queue_breaks_no_other(memory: Memory) -> None:
    """R12: two queues in one memory."""
    bad, good = SplitRing(SIZE, 0, memory), PackedRing(SIZE, 0, memory)
    good.at = RingAddresses(*(each + 0x1000 for each in bad.at))
    queue = good.queue()
    bad.chain((AT, 0, 0, 0))
    refuse(bad, "buffer-empty")
    good.chain(GOOD)
    assert len(queue.pop_batch(1)) == 1


def test_flags_that_are_not_available_are_not(memory: Memory) -> None:
    """2.8.1: AVAIL and USED must differ, and fit the lap."""
    ring = PackedRing(2, 0, memory)
    queue = ring.queue()
    for flags in (0, AVAIL | 1 << 15, 1 << 15):
        memory.put("QIHH", RING, AT, 4, 0, flags)
        assert queue.pop_batch(1) == []
