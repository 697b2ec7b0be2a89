"""Hostile values: each faults the ring with its name, and nothing works any more."""

from array import array
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ioq import Index, Ring, RingFault
from shm import Locality
from shm.errors import InvalidError
from tests.ioq.memory import BUFFERS, RING, SIZE, Guest

NORTH, SOUTH = Locality
Make = Callable[[int], Guest]
TOP = 2**64


def uses(ring: Ring) -> dict[str, Callable[[], object]]:
    """Every operation that touches the ring."""
    into, sizes = bytearray(1 << 16), array("I", [0] * 8)
    it = ring.iterator(Index.INUSE)
    return {
        "peek": lambda: ring.peek(1),
        "pop": lambda: ring.pop(1),
        "push": lambda: ring.push([(0, 0, 0)]),
        "produce": lambda: ring.produce(b"x", 1),
        "consume": lambda: ring.consume(into, sizes, 8),
        "entries": lambda: ring.entries(),
        "arm": lambda: ring._arm(0),
        "seek_head": it.seek_head,
        "seek_tail": it.seek_tail,
        "it.push": it.push,
        "it.pop": it.pop,
        "it.ptr": lambda: it.ptr,
        "it.owner": lambda: it.owner,
    }


def assert_dead(ring: Ring, reason: str) -> None:
    assert ring.fault == reason
    assert ring.statistics().fault == reason
    assert (ring.owned(), ring.room(), ring._spin(0, 1000)) == (False, False, False)
    for use in uses(ring).values():
        with pytest.raises(RingFault) as caught:
            use()
        assert caught.value.reason == reason


def filled(guest: Guest, messages: int = 3) -> Ring:
    """South's end of a ring with messages from north."""
    north = guest.end(NORTH)
    assert north.produce(b"m" * 8 * messages, 8, slots=(BUFFERS, 64)) == messages
    return guest.end(SOUTH)


INDEX = {"valid": 24, "inuse": 36}


@pytest.mark.parametrize("value", [5, 2**31, 2**32 - 1])
def test_our_head_out_of_range(make_guest: Make, value: int) -> None:
    guest = make_guest(5)
    ring = filled(guest)
    guest.view.write(36, value.to_bytes(4, "little"))
    with pytest.raises(RingFault):
        ring.pop(1)
    assert_dead(ring, "inuse-head-range")


def test_our_head_moved_by_the_peer(make_guest: Make) -> None:
    guest = make_guest(5)
    ring = filled(guest)
    guest.view.write(36, b"\x02")
    with pytest.raises(RingFault):
        ring.consume(bytearray(64), array("I", [0]), 1)
    assert_dead(ring, "inuse-head-moved")


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (36, 5, "inuse-head-range"),
        (40, 77, "inuse-tail-range"),
        (40, 1, "inuse-tail-moved"),
    ],
)
def test_indices_while_producing(
    make_guest: Make, offset: int, value: int, reason: str
) -> None:
    guest = make_guest(5)
    north, ring = guest.end(NORTH), guest.end(SOUTH)
    north.push([(0, BUFFERS, 64)] * 5, Index.VALID)
    guest.view.write(offset, bytes([value]))
    with pytest.raises(RingFault):
        ring.produce(b"12345678", 4)
    assert_dead(ring, reason)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (24, 5, "valid-head-range"),
        (28, 5, "valid-tail-range"),
        (28, 2, "valid-tail-moved"),
        (36, 5, "inuse-head-range"),
        (40, 6, "inuse-tail-range"),
        (40, 2, "inuse-tail-moved"),
    ],
)
def test_indices_while_pushing_on_both(
    make_guest: Make, offset: int, value: int, reason: str
) -> None:
    guest = make_guest(5)
    north = guest.end(NORTH)
    guest.view.write(offset, bytes([value]))
    with pytest.raises(RingFault):
        north.push([(0, 0, 0)], both=True)
    assert_dead(north, reason)


def test_two_tails_that_differ(make_guest: Make) -> None:
    """ABI 6.3: valid and inuse move together, or the queue faults."""
    guest = make_guest(5)
    guest.view.write(40, b"\x02")
    north = guest.end(NORTH)
    with pytest.raises(RingFault):
        north.push([(0, 0, 0)], both=True)
    assert_dead(north, "tails-differ")


@pytest.mark.parametrize(("offset", "index"), [(24, 0), (28, 0), (36, 1), (40, 1)])
def test_seeking_to_an_index_out_of_range(
    make_guest: Make, offset: int, index: int
) -> None:
    guest = make_guest(5)
    ring = guest.end(SOUTH)
    guest.view.write(offset, b"\x05")
    end = "head" if offset in (24, 36) else "tail"
    it = ring.iterator(Index(index))
    with pytest.raises(RingFault):
        it.seek_head() if end == "head" else it.seek_tail()
    assert_dead(ring, f"{Index(index).name.lower()}-{end}-range")


@pytest.mark.parametrize(
    ("ptr", "length"),
    [(SIZE, 8), (SIZE - 4, 8), (TOP - 4, 8), (TOP - 1, 1), (0, SIZE + 1)],
)
def test_a_message_outside_the_guest(make_guest: Make, ptr: int, length: int) -> None:
    """R50: `ptr` and `len` lead nowhere but into memory of the guest."""
    guest = make_guest(5)
    guest.end(NORTH).push([(0, ptr, length)])
    ring = guest.end(SOUTH)
    with pytest.raises(RingFault):
        ring.consume(bytearray(SIZE + 8), array("I", [0]), 1)
    assert_dead(ring, "buffer-address")


@pytest.mark.parametrize("length", [65, 2**32, 2**64 - 1])
def test_a_message_longer_than_the_receiver_takes(
    make_guest: Make, length: int
) -> None:
    guest = make_guest(5)
    guest.end(NORTH).push([(0, 0, length)])
    ring = guest.end(SOUTH)
    with pytest.raises(RingFault):
        ring.consume(bytearray(64), array("I", [0]), 1)
    assert_dead(ring, "message-length")


def test_a_buffer_outside_the_guest(make_guest: Make) -> None:
    guest = make_guest(5)
    guest.end(NORTH).push([(0, SIZE - 2, 64)], Index.VALID)
    ring = guest.end(SOUTH)
    with pytest.raises(RingFault):
        ring.produce(b"1234", 4)
    assert_dead(ring, "buffer-address")


def test_good_messages_before_a_bad_one_are_delivered(make_guest: Make) -> None:
    guest = make_guest(5)
    guest.spaces[NORTH].write(BUFFERS, b"good")
    guest.end(NORTH).push([(0, BUFFERS, 4), (1, SIZE, 4), (2, BUFFERS, 4)])
    ring = guest.end(SOUTH)
    into, sizes = bytearray(64), array("I", [0] * 5)
    assert ring.consume(into, sizes, 5) == 1
    assert into[:4] == b"good"
    with pytest.raises(RingFault):
        ring.consume(into, sizes, 5)


def test_a_ring_ends_with_its_memory(make_guest: Make) -> None:
    """R50: DMA_UNMAP of the ring's memory ends it, whatever happens next."""
    guest = make_guest(5)
    ring = filled(guest)
    guest.spaces[SOUTH].clear()
    assert_dead(ring, "unmapped")
    guest.spaces[SOUTH].map(0, SIZE, guest.fd)
    assert_dead(ring, "unmapped")


def test_a_buffer_unmapped_under_a_ring(make_guest: Make) -> None:
    """R50: the ring is one region, its buffers another, which the guest takes away."""
    guest = make_guest(5)
    ring = filled(guest)
    space = guest.spaces[SOUTH]
    space.clear()
    space.map(0, BUFFERS, guest.fd)
    ring = guest.end(SOUTH)
    with pytest.raises(RingFault):
        ring.consume(bytearray(64), array("I", [0]), 1)
    assert_dead(ring, "buffer-address")


def test_an_owner_byte_that_is_nobody_is_not_ours(make_guest: Make) -> None:
    guest = make_guest(5)
    ring = filled(guest)
    guest.view.write(56 + 25, b"\x02")
    assert ring.pop(5) == []
    assert not ring.owned()
    assert ring.fault is None


def test_a_message_that_does_not_fit_is_the_callers_fault(make_guest: Make) -> None:
    """Misuse and a peer's breach are different errors; the ring goes on."""
    guest = make_guest(5)
    north, south = guest.end(NORTH), guest.end(SOUTH)
    north.push([(0, BUFFERS, 4)], Index.VALID)
    with pytest.raises(InvalidError, match="does not fit"):
        south.produce(b"12345", 5)
    assert south.produce(b"1234", 4) == 1
    with pytest.raises(InvalidError, match="does not fit"):
        north.produce(b"12345", 5, slots=(BUFFERS, 4))
    for payload, sizes in [(b"123", array("I", [2, 2])), (b"", 0)]:
        with pytest.raises(InvalidError, match="payload"):
            south.produce(payload, sizes)
    with pytest.raises(TypeError):
        south.produce(b"1234", array("H", [4]))
    with pytest.raises(InvalidError):
        south.forward(south, 1)


def test_forward_names_the_ring_that_broke(make_guest: Make) -> None:
    source, target = make_guest(3), make_guest(3)
    source.end(NORTH).push([(0, SIZE, 8)])
    target.end(NORTH).push([(0, BUFFERS, 64)], Index.VALID)
    out, back = source.end(SOUTH), target.end(SOUTH)
    with pytest.raises(RingFault):
        out.forward(back, 1)
    assert (out.fault, back.fault) == ("buffer-address", None)

    source, target = make_guest(3), make_guest(3)
    target.end(NORTH).push([(0, SIZE - 1, 64)], Index.VALID)
    out, back = filled(source), target.end(SOUTH)
    with pytest.raises(RingFault):
        out.forward(back, 1)
    assert (out.fault, back.fault) == (None, "buffer-address")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(8, 56 + 4 * 32 - 1),
            st.binary(min_size=1, max_size=8),
            st.sampled_from(["peek", "pop", "push", "produce", "consume", "it.push",
                             "it.pop", "seek_head", "arm", "entries", "forward"]),
        ),
        max_size=25,
    )
)  # fmt: skip
def test_garbage_anywhere_ends_in_a_fault_at_worst(
    steps: list[tuple[int, bytes, str]],
) -> None:
    """R50: whatever lies in the ring, an operation works, refuses, or faults."""
    guest = Guest(4)
    north, ring = guest.end(NORTH), guest.end(SOUTH)
    other = Guest(4)
    other.end(NORTH).push([(0, BUFFERS, 4096)] * 4, Index.VALID)
    sink = other.end(SOUTH)
    north.push([(i, BUFFERS + 64 * i, 64) for i in range(4)])
    outside = guest.spaces[SOUTH].read(RING + guest.view.size, 4096)
    for offset, data, what in steps:
        guest.view.write(offset, data[: guest.view.size - offset])
        use = uses(ring).get(what) or (lambda: ring.forward(sink, 4))
        with suppress(RingFault, InvalidError):
            use()
        assert sink.fault is None or what == "forward"
        if ring.fault:
            assert_dead(ring, ring.fault)
            break
    if not any(what in ("produce", "push") for _, _, what in steps):
        assert guest.spaces[SOUTH].read(RING + guest.view.size, 4096) == outside
    guest.close()
    other.close()
