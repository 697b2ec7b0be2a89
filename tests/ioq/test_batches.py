"""Batches: messages through rings, in order, whole, and handed over once."""

import os
from array import array
from collections.abc import Callable

import pytest

from ioq import Index, Ring
from shm import Locality
from tests.ioq.memory import BUFFERS, Guest

NORTH, SOUTH = Locality
Make = Callable[[int], Guest]


def split(into: bytearray, sizes: "array[int]", n: int) -> list[bytes]:
    out, at = [], 0
    for size in sizes[:n]:
        out.append(bytes(into[at : at + size]))
        at += size
    return out


def take(ring: Ring, limit: int = 64, repost: int | None = None) -> list[bytes]:
    into, sizes = bytearray(1 << 17), array("I", [0] * limit)
    return split(into, sizes, ring.consume(into, sizes, limit, repost))


def test_messages_of_many_sizes_keep_their_order(make_guest: Make) -> None:
    """R12: north sends, south receives; odd counts and sizes wrap around the ring."""
    guest = make_guest(7)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    sent, got = [], []
    for size in range(200):
        message = os.urandom(size)
        sent.append(message)
        assert north.produce(message, array("I", [size]), slots=(BUFFERS, 256)) == 1
        if size % 5 == 4:
            got += take(south)
    assert got == sent


@pytest.mark.parametrize("batch", [1, 2, 6, 7, 8])
def test_a_batch_takes_what_there_is_room_for(make_guest: Make, batch: int) -> None:
    guest = make_guest(7)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    payload = b"".join(bytes([i]) * 8 for i in range(batch))
    for _ in range(9):
        taken = north.produce(payload, 8, slots=(BUFFERS, 8))
        assert taken == min(batch, 7)
        assert north.room() == (taken < 7)
        assert b"".join(take(south)) == payload[: 8 * taken]
        assert not south.owned()


def test_a_full_ring_says_so_in_the_index(make_guest: Make) -> None:
    guest = make_guest(3)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    assert north.produce(bytes(3), 1, slots=(BUFFERS, 64)) == 3
    assert north.produce(bytes(1), 1, slots=(BUFFERS, 64)) == 0
    assert (guest.view.read(44, 1), north.entries()) == (b"\1", 3)
    assert len(south.pop(1)) == 1
    assert (guest.view.read(44, 1), north.entries()) == (b"\0", 2)


def test_south_fills_what_north_posted(make_guest: Make) -> None:
    """R12: the receive direction; a buffer goes back with its full size."""
    guest = make_guest(4)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    assert south.produce(b"early", 5) == 0
    buffers = [(i, BUFFERS + 128 * i, 128) for i in range(4)]
    north.push(buffers, Index.VALID)
    for turn in range(6):
        messages = [os.urandom(turn + i) for i in range(3)]
        sizes = array("I", map(len, messages))
        assert south.produce(b"".join(messages), sizes) == 3
        assert take(north, repost=128) == messages
    assert south.room()


def test_a_payload_may_be_any_contiguous_buffer(make_guest: Make) -> None:
    guest = make_guest(4)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    for payload in (b"ab", bytearray(b"ab"), memoryview(b"xabx")[1:3]):
        assert north.produce(payload, 1, slots=(BUFFERS, 8)) == 2
        assert take(south) == [b"a", b"b"]
    lengths = memoryview(array("I", [9, 1, 1]))[1:]
    assert north.produce(b"ab", lengths, slots=(BUFFERS, 8)) == 2
    into, sizes = bytearray(4), array("I", [0] * 4)
    assert south.consume(memoryview(into)[2:], memoryview(sizes)[1:3], 9) == 2
    assert (bytes(into), list(sizes)) == (b"\0\0ab", [0, 1, 1, 0])


def test_receiving_stops_where_the_payload_is_full(make_guest: Make) -> None:
    guest = make_guest(4)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    north.produce(b"abcdef", 2, slots=(BUFFERS, 8))
    into, sizes = bytearray(5), array("I", [0] * 4)
    assert south.consume(into, sizes, 4) == 2
    assert south.consume(into, sizes, 4) == 1
    assert into[:2] == b"ef"


def test_buffers_may_lie_across_region_borders(make_guest: Make) -> None:
    """R50: scatter into and gather from two regions for one message."""
    guest = make_guest(4)
    for space in guest.spaces.values():
        space.map(guest.size, 4096, guest.fd, 0x80000)
    slots = (guest.size - 30, 64)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    message = os.urandom(64)
    assert north.produce(message, 64, slots=slots) == 1
    assert take(south) == [message]


def test_forwarding_from_guest_to_guest(make_guest: Make) -> None:
    """Messages move from one guest's memory to another's; a long one is dropped."""
    left, right = make_guest(8), make_guest(8)
    right.end(NORTH).push([(i, BUFFERS + 64 * i, 16) for i in range(8)], Index.VALID)
    north, sink = left.end(NORTH), right.end(SOUTH)
    messages = [b"one", b"x" * 17, b"", b"x" * 16, b"four"]
    sizes = array("I", map(len, messages))
    north.produce(b"".join(messages), sizes, slots=(BUFFERS, 64))
    source = left.end(SOUTH)
    assert source.forward(sink, 99) == 5
    assert take(right.end(NORTH)) == [m for m in messages if len(m) <= 16]
    assert source.statistics().dropped == 1
    assert north.room()


def test_forwarding_stops_without_buffers(make_guest: Make) -> None:
    left, right = make_guest(8), make_guest(8)
    right.end(NORTH).push([(i, BUFFERS + 64 * i, 64) for i in range(2)], Index.VALID)
    left.end(NORTH).produce(b"abcd", 1, slots=(BUFFERS, 64))
    source, sink = left.end(SOUTH), right.end(SOUTH)
    assert source.forward(sink, 1) == 1
    assert source.forward(sink, 9) == 1
    assert source.forward(sink, 9) == 0
    assert source.owned()


def test_forwarding_inside_one_guest_may_overlap(make_guest: Make) -> None:
    guest = make_guest(2)
    other = Guest(2)
    north = guest.end(NORTH)
    guest.spaces[NORTH].write(BUFFERS, bytes(range(100)))
    north.push([(0, BUFFERS, 100)])
    # The second ring lies in another file, but its buffers are the first guest's.
    view = other.spaces[SOUTH].view(0x10000, 120)
    other.end(NORTH).push([(0, BUFFERS + 10, 100)], Index.VALID)
    sink = Ring(view, guest.spaces[SOUTH], SOUTH, print)
    assert guest.end(SOUTH).forward(sink, 1) == 1
    assert guest.spaces[NORTH].read(BUFFERS + 10, 100) == bytes(range(100))
    other.close()


def test_an_entry_that_unmaps_while_pushed(make_guest: Make) -> None:
    """R50: code that runs inside a batch cannot make it touch unmapped memory."""
    guest = make_guest(4)
    ring = guest.end(NORTH)

    class Entries(list[tuple[int, int, int]]):
        def __getitem__(self, at: object) -> tuple[int, int, int]:  # type: ignore[override]
            guest.spaces[NORTH].clear()
            return (1, 2, 3)

    with pytest.raises(Exception, match="unmapped"):
        ring.push(Entries([(0, 0, 0)] * 2))
