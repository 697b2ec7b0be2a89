"""Rings byte for byte: the golden vectors of the ABI, attaching, the iterator."""

from collections.abc import Callable

import pytest

from ioq import Index, Ring, ring_size
from shm import AddressSpace, Locality, View
from shm.errors import InvalidError
from tests.ioq.memory import RING, Guest

NORTH, SOUTH = Locality
Make = Callable[[int], Guest]


def dump(view: View) -> list[str]:
    """Sixteen bytes a line, as the ABI page prints them."""
    data = view.read()
    return [data[i : i + 16].hex(" ") for i in range(0, len(data), 16)]


HEAD = "e4 2f fa 47 04 00 00 00 df 39 fa 58 01 00 00 00"
ZERO = "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
LAST = "00 00 00 00 00 00 00 00"


@pytest.mark.parametrize(("count", "size"), [(1, 88), (256, 8248), (1024, 32824)])
def test_ring_sizes(count: int, size: int) -> None:
    assert ring_size(count) == size


def test_a_fresh_ring_of_256(make_guest: Make) -> None:
    """ABI 11.7: the first 56 bytes, the rest zero."""
    guest = make_guest(256)
    lines = dump(guest.view)
    assert lines[:3] == [HEAD, ZERO, ZERO]
    assert lines[3] == "00 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
    assert set(lines[4:-1]) == {ZERO}
    assert guest.view.size == 8248


def test_a_receive_ring_step_by_step(make_guest: Make) -> None:
    """ABI 11.9 a to e, R12: every byte after every step, from both sides."""
    guest = make_guest(2)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    a = [HEAD, ZERO, ZERO, "02" + ZERO[2:], ZERO, ZERO, ZERO, LAST]
    assert dump(guest.view) == a

    # b. north posts buffer 0
    it = north.iterator(Index.VALID)
    it.seek_tail()
    it.cookie, it.ptr, it.len, it.valid = 0xFFFF888000001000, 0x1000, 1514, True
    it.push()
    b = a.copy()
    b[1] = "00 00 00 00 00 00 00 00 00 00 00 00 01 00 00 00"
    b[3] = "02 00 00 00 00 00 00 00 00 10 00 00 80 88 ff ff"
    b[4] = "00 10 00 00 00 00 00 00 ea 05 00 00 00 00 00 00"
    b[5] = "01 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
    assert dump(guest.view) == b

    # c. north posts buffer 1: valid wraps, full = 1
    it.cookie, it.ptr, it.len, it.valid = 0xFFFF888000002000, 0x2000, 1514, True
    it.push()
    c = b.copy()
    c[1] = ZERO
    c[2] = "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
    c[5] = "01 01 00 00 00 00 00 00 00 20 00 00 80 88 ff ff"
    c[6] = "00 20 00 00 00 00 00 00 ea 05 00 00 00 00 00 00"
    c[7] = "01 01 00 00 00 00 00 00"
    assert dump(guest.view) == c

    # d. north is enabled; south fills buffer 0, pushes inuse, signals
    north.signal.enable()
    filler = south.iterator(Index.INUSE, auto_update=True)
    filler.seek_tail()
    assert (filler.ptr, filler.len, filler.owner) == (0x1000, 1514, SOUTH)
    filler.len = 60
    filler.push()
    assert guest.notified[NORTH] == 1
    d = c.copy()
    d[1] = "01 01 01 00 00 00 00 00 00 00 00 00 00 00 00 00"
    d[2] = "01 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00"
    d[4] = "00 10 00 00 00 00 00 00 3c 00 00 00 00 00 00 00"
    d[5] = "01 00" + c[5][5:]
    assert dump(guest.view) == d

    # e. north's handler posts a new buffer, pops, signals; the wakeup ends
    north.signal.wakeup_begin()
    taker = north.iterator(Index.INUSE, auto_update=True)
    taker.seek_head()
    assert (taker.len, taker.owner) == (60, NORTH)
    taker.cookie, taker.ptr, taker.len = 0xFFFF888000003000, 0x3000, 1514
    taker.pop()
    assert north.signal.wakeup_end() is False
    assert guest.notified[SOUTH] == 0
    e = d.copy()
    e[1] = "01 00 00 00 00 01 00 00 00 00 00 00 00 00 00 00"
    e[2] = "01 00 00 00 01 00 00 00 01 00 00 00 00 00 00 00"
    e[3] = "02 00 00 00 00 00 00 00 00 30 00 00 80 88 ff ff"
    e[4] = "00 30 00 00 00 00 00 00 ea 05 00 00 00 00 00 00"
    e[5] = "01 01" + c[5][5:]
    assert dump(guest.view) == e


def test_the_same_by_batches(make_guest: Make) -> None:
    """ABI 11.9: posting in a batch, filling by produce, taking by consume."""
    from array import array

    guest = make_guest(2)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    buffers = [(0xFFFF888000001000, 0x1000, 1514), (0xFFFF888000002000, 0x2000, 1514)]
    assert north.push(buffers, Index.VALID) == 2
    assert north.push(buffers, Index.VALID) == 0
    lines = dump(guest.view)
    assert lines[1:3] == [ZERO, "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"]
    assert lines[7] == "01 01 00 00 00 00 00 00"
    assert south.produce(b"x" * 60, 60) == 1
    assert guest.view.read(40, 5) == b"\x01\0\0\0\0"
    into, sizes = bytearray(2000), array("I", [0, 0])
    assert north.consume(into, sizes, 2, repost=1514) == 1
    assert (bytes(into[:60]), sizes[0]) == (b"x" * 60, 60)
    assert dump(guest.view)[4] == "00 10 00 00 00 00 00 00 ea 05 00 00 00 00 00 00"
    assert dump(guest.view)[5][:5] == "01 01"


# What a host checks at attach (ABI 6.1): offset in the ring, bytes, name of the check.
SPOILED = [
    (0, "e5", "magic"),
    (3, "00", "magic"),
    (4, "03", "version"),
    (8, "00", "signal"),
    (12, "02", "signal"),
    (48, "00000000", "count"),
    (48, "ffffffff", "count"),
    (48, "01080000", "count"),
    (48, "08000000", "size"),
    (48, "06000000", "size"),
    (24, "07000000", "valid-head-range"),
    (28, "ffffffff", "valid-tail-range"),
    (36, "08000000", "inuse-head-range"),
    (40, "07000000", "inuse-tail-range"),
]


@pytest.mark.parametrize(("offset", "data", "reason"), SPOILED)
def test_a_spoiled_ring_is_not_attached(
    make_guest: Make, offset: int, data: str, reason: str
) -> None:
    guest = make_guest(7)
    guest.view.write(offset, bytes.fromhex(data))
    with pytest.raises(InvalidError, match=f"no ring to attach to: {reason}$"):
        guest.end(SOUTH)


def test_a_ring_may_have_any_count_up_to_the_limit(make_guest: Make) -> None:
    for count in (1, 3, 2048):
        assert make_guest(count).end(SOUTH).count == count
    with pytest.raises(InvalidError, match="count"):
        make_guest(9).end(SOUTH, limit=8)
    with pytest.raises(InvalidError, match="count"):
        make_guest(2049).end(SOUTH)


@pytest.mark.parametrize("size", [0, -1, 1, -120])
def test_the_size_must_fit_exactly(make_guest: Make, size: int) -> None:
    guest = make_guest(2)
    space = guest.spaces[SOUTH]
    if size == 0:
        view = space.view(RING, 55)
    else:
        view = space.view(RING, max(ring_size(2) + size, 8))
    with pytest.raises(InvalidError, match="size"):
        Ring(view, space, SOUTH, print)


def test_read_only_misaligned_and_unmapped_memory_is_refused(make_guest: Make) -> None:
    guest = make_guest(2)
    space = guest.spaces[SOUTH]
    view = space.view(RING, 120, writable=False)
    with pytest.raises(InvalidError, match="read-only"):
        Ring(view, space, SOUTH, print)
    space.write(RING + 0x1004, guest.view.read())
    with pytest.raises(InvalidError, match="alignment"):
        Ring(space.view(RING + 0x1004, 120), space, SOUTH, print)
    view = space.view(RING, 120)
    space.clear()
    with pytest.raises(InvalidError, match="unmapped"):
        Ring(view, space, SOUTH, print)


def test_attaching_again_goes_on_where_the_ring_is(make_guest: Make) -> None:
    """A backend that restarts finds the positions in the ring."""
    guest = make_guest(4)
    north = guest.end(NORTH)
    north.push([(i, 0x1000 * i, 64) for i in range(3)])
    assert [entry[0] for entry in guest.end(SOUTH).pop(2)] == [0, 1]
    again = guest.end(SOUTH)
    assert [entry[0] for entry in again.pop(9)] == [2]
    assert guest.end(NORTH).push([(7, 7, 7)] * 9) == 4


@pytest.mark.parametrize(("count", "size"), [(0, 56), (2, 119), (2, 121), (2**33, 120)])
def test_a_ring_is_formatted_only_where_it_fits(
    make_guest: Make, count: int, size: int
) -> None:
    view = make_guest(1).spaces[NORTH].view(0, size)
    with pytest.raises(InvalidError):
        Ring.format(view, count)


def test_localities_are_two(make_guest: Make) -> None:
    guest = make_guest(1)
    with pytest.raises(InvalidError):
        Ring(guest.view, guest.spaces[NORTH], 2, print)  # type: ignore[arg-type]


def test_it_takes_a_view_and_a_space(make_guest: Make) -> None:
    guest = make_guest(1)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        Ring(b"", AddressSpace(), SOUTH, print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="PyCapsule"):
        Ring(guest.view, guest.view, SOUTH, print)  # type: ignore[arg-type]


def test_seeking_touches_nothing_shared(make_guest: Make) -> None:
    guest = make_guest(5)
    before = guest.view.read()
    it = guest.end(SOUTH).iterator(Index.INUSE)
    it.seek_set(4)
    it.seek_next()
    assert it.position == 0
    it.seek_head()
    it.seek_tail()
    with pytest.raises(InvalidError):
        it.seek_set(5)
    assert guest.view.read() == before


def test_push_and_pop_need_position_and_owner(make_guest: Make) -> None:
    guest = make_guest(3)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    it = south.iterator(Index.INUSE)
    with pytest.raises(InvalidError):  # the tail, but north's
        it.push()
    with pytest.raises(InvalidError):
        it.ptr = 5
    it = north.iterator(Index.INUSE)
    it.seek_set(1)
    with pytest.raises(InvalidError):  # ours, but not the tail
        it.push()
    assert north.fault is None


def test_the_transmit_use_of_both_indices(make_guest: Make) -> None:
    """ABI 6.4: pushed on both, popped from inuse by south, reaped from valid."""
    guest = make_guest(2)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    it = north.iterator()
    it.cookie, it.ptr, it.len, it.valid = 1, 0x1000, 60, True
    it.push()
    assert (north.entries(Index.VALID), north.entries(Index.INUSE)) == (1, 1)
    assert north.push([(2, 0x2000, 61), (3, 0x3000, 62)], both=True) == 1
    assert north.pop(9, Index.VALID, flip=False) == []  # nothing is completed
    assert south.pop(1) == [(1, 0x1000, 60)]
    # Completed, but not reaped: the cookie may not be overwritten.
    assert north.push([(3, 0x3000, 62)], both=True) == 0
    assert north.pop(9, Index.VALID, flip=False) == [(1, 0x1000, 60)]
    assert north.push([(3, 0x3000, 62)], both=True) == 1
    assert [e[0] for e in south.pop(9)] == [2, 3]
    assert [e[0] for e in north.pop(9, Index.VALID, flip=False)] == [2, 3]
    assert north.pop(9, Index.VALID, flip=False) == []
    # Completed descriptors keep cookie, ptr and len (ABI 12.2).
    assert guest.view.read(56 + 32, 26).hex() == (
        "02000000000000000020000000000000" + "3d000000000000000000"
    )


def test_an_iterator_that_keeps_the_owner(make_guest: Make) -> None:
    guest = make_guest(1)
    it = guest.end(NORTH).iterator(Index.VALID, flip_owner=False)
    it.push()
    assert guest.view.read(24, 9).hex() == "00000000" + "00000000" + "01"
    it.pop()
    assert it.owner == NORTH
    assert guest.view.read(32, 1) == b"\0"


def test_statistics_of_a_ring(make_guest: Make) -> None:
    guest = make_guest(4)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    south.signal.enable()
    north.push([(0, 0, 0)] * 3)
    north.signal.inject()
    north.signal.inject()
    south.pop(2)
    sent, got = north.statistics(), south.statistics()
    assert (sent.count, sent.pushed, sent.injects, sent.notifications) == (4, 3, 2, 1)
    assert (got.popped, got.fault, got.dropped) == (2, None, 0)
