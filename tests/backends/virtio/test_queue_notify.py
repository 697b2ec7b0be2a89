"""When a virtqueue's device end asks for kicks, and when it interrupts."""

from collections.abc import Iterator

import pytest

from backends.virtio.queue import QueueState
from tests.backends.virtio.driver_ring import (
    BUFFERS,
    EVENT_IDX,
    WRITE,
    Memory,
    PackedRing,
    SplitRing,
)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def test_a_split_ring_without_event_idx(memory: Memory) -> None:
    """2.7.7, 2.7.10: flags of either side."""
    ring = SplitRing(4, memory=memory)
    queue = ring.queue()
    queue.disable_kicks()
    assert memory.get("H", ring.at.device) == (1,)
    assert queue.enable_kicks() is False
    assert memory.get("H", ring.at.device) == (0,)
    ring.chain((BUFFERS, 4, WRITE, 0))
    assert queue.enable_kicks() is True
    assert queue.should_notify() is False
    queue.push(queue.pop_batch(1)[0], 0)
    assert [queue.should_notify(), queue.should_notify()] == [True, False]
    memory.put("H", ring.at.driver, 1)
    ring.chain((BUFFERS, 4, WRITE, 0))
    queue.push(queue.pop_batch(1)[0], 0)
    assert queue.should_notify() is False


def test_a_split_ring_with_event_idx(memory: Memory) -> None:
    """2.7.10: at the index that the other side named, also past the 16-bit wrap."""
    ring = SplitRing(4, EVENT_IDX, memory)
    ring.next = 0xFFFE
    ring.set_index(ring.next)
    memory.put("H", ring.at.device + 2, 0xFFFE)
    queue = ring.queue(QueueState(0xFFFE, 0xFFFE))
    assert queue.should_notify() is True  # nobody knows what it was told
    notified = []
    for event in (0xFFFF, 0xFFFF, 0xFFFF, 3, 1, 3):
        memory.put("H", ring.at.driver + 4 + 2 * 4, event)
        ring.chain((BUFFERS, 4, WRITE, 0))
        queue.push(queue.pop_batch(1)[0], 0)
        notified.append(queue.should_notify())
    # used indices before each: fffe, ffff, 0, 1, 2, 3
    assert notified == [False, True, False, False, False, True]
    queue.disable_kicks()
    assert memory.get("H", ring.at.device) == (0,)
    assert queue.enable_kicks() is False
    assert memory.get("H", ring.at.device + 4 + 8 * 4) == (4,)


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_a_packed_ring_says_when_to_kick(memory: Memory, features: int) -> None:
    """2.8.10: off, on, and with EVENT_IDX at a place on a lap."""
    ring = PackedRing(3, features, memory)
    queue = ring.queue()
    queue.disable_kicks()
    assert memory.get("HH", ring.at.device)[1] == 1
    places = []
    for _ in range(4):
        assert queue.enable_kicks() is False
        places.append(memory.get("HH", ring.at.device))
        ring.chain((BUFFERS, 4, WRITE, 0))
        assert queue.enable_kicks() is True
        queue.push(queue.pop_batch(1)[0], 0)
    if features:
        assert places == [(0x8000, 2), (0x8001, 2), (0x8002, 2), (0x0000, 2)]
    else:
        assert places == [(0, 0)] * 4


@pytest.mark.parametrize(
    ("flags", "event", "expected"),
    [
        (0, 0, [True] * 6),
        (1, 0, [False] * 6),
        (3, 0, [True] * 6),  # reserved: rather once too often
        (2, 0x8002, [False, False, True, False, False, False]),
        (2, 0x0001, [False, False, False, False, True, False]),
    ],
)
def test_a_packed_ring_hears_when_to_interrupt(
    memory: Memory, flags: int, event: int, expected: list[bool]
) -> None:
    """2.8.10: the place counts on its own lap only."""
    ring = PackedRing(3, EVENT_IDX, memory)
    queue = ring.queue()
    memory.put("HH", ring.at.driver, event, flags)
    notified = []
    for _ in range(6):
        ring.chain((BUFFERS, 4, WRITE, 0))
        queue.push(queue.pop_batch(1)[0], 0)
        notified.append(queue.should_notify())
    assert notified == expected
