"""The event queues as a state machine: priorities, coalescing, no loss (R6, R7)."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vbus.abi import EVENT, EventId
from vbus.errors import RingFault
from vbus.events import Event, EventQueues


class End:
    """A ring with room for `room` records; it can turn hostile."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.records: list[bytes] = []
        self.asked = False
        self.signals = 0
        self.hostile = False

    def put(self, record: bytes) -> bool:
        assert not self.asked
        if self.hostile:
            raise RingFault("garbage")
        if len(self.records) == self.room:
            return False
        self.records.append(record)
        return True

    def signal(self) -> None:
        self.signals += 1

    def ask_for_room(self) -> None:
        assert not self.asked
        self.asked = True

    def stop_asking(self) -> None:
        self.asked = False

    def take(self) -> list[tuple[int, int]]:
        taken, self.records = self.records, []
        return [(record.eventid, record.handle) for record in map(EVENT.unpack, taken)]


def signal(cookie: int, priority: int = 0) -> Event:
    return Event(EventId.SHMSIGNAL, cookie, priority=priority)


@pytest.fixture
def queues() -> EventQueues:
    def unexpected(index: int, reason: str) -> None:
        raise AssertionError(f"queue {index}: {reason}")

    return EventQueues(unexpected)


def handles(end: End) -> list[int]:
    return [handle for _, handle in end.take()]


@pytest.mark.parametrize("count", range(1, 9))
def test_priority_selects_the_queue(queues: EventQueues, count: int) -> None:
    """ABI 4.3: min(prio, queues - 1)."""
    ends = [End() for _ in range(count)]
    queues.open(ends)
    for priority in range(8):
        queues.post(signal(priority, priority))
    for index, end in enumerate(ends[:-1]):
        assert handles(end) == [index]
    assert handles(ends[-1]) == list(range(count - 1, 8))


def test_a_priority_beyond_seven_is_seven(queues: EventQueues) -> None:
    """ABI 10.2: unsigned, whatever the guest gave."""
    assert signal(1, 0xFFFFFFFF).priority == 7


def test_an_event_waits_once(queues: EventQueues) -> None:
    """R6: at most one outstanding event object per signal."""
    end = End(room=1)
    queues.open([end])
    first, second = signal(1), signal(2)
    queues.post(first)
    for _ in range(5):
        queues.post(second)
    assert queues.waiting == 1
    assert queues.statistics().coalesced == 4
    assert handles(end) == [1]
    queues.room(0)
    assert handles(end) == [2]
    queues.post(second)
    queues.validate()


def test_back_pressure_loses_nothing_and_goes_on_by_priority(
    queues: EventQueues,
) -> None:
    """ABI 4.2, and with one queue the backlog is delivered highest first."""
    end = End(room=2)
    queues.open([end])
    queues.post(signal(100), signal(101))
    for number in range(6):
        queues.post(signal(number, priority=number % 3))
    assert end.asked
    delivered = []
    while queues.waiting or end.records:
        delivered += handles(end)
        queues.room(0)
    assert delivered == [100, 101, 2, 5, 1, 4, 0, 3]
    assert queues.statistics().lost == 0


def test_one_signal_for_a_batch(queues: EventQueues) -> None:
    end = End()
    queues.open([end])
    queues.post(*[signal(number) for number in range(50)])
    assert end.signals == 1
    queues.room(0)  # a doorbell without need changes nothing
    assert end.signals == 1


def test_a_stalled_queue_does_not_hold_up_another(queues: EventQueues) -> None:
    low, high = End(room=0), End()
    queues.open([low, high])
    queues.post(signal(1, 0), signal(2, 7))
    assert handles(high) == [2]
    assert low.asked
    assert not high.asked


@pytest.mark.parametrize("waiting", [True, False])
def test_close_turns_the_event_into_shmclose(
    queues: EventQueues, waiting: bool
) -> None:
    """ABI 4.4: in its place, also when it still waits as SHMSIGNAL."""
    end = End(room=0)
    queues.open([end])
    closing, other = signal(1), signal(2)
    if waiting:
        queues.post(closing)
    queues.post(other)
    queues.close(closing, 1)
    end.room = 10
    queues.room(0)
    close, keep = (EventId.SHMCLOSE, 1), (EventId.SHMSIGNAL, 2)
    assert end.take() == ([close, keep] if waiting else [keep, close])


def test_events_wait_for_qreg(queues: EventQueues) -> None:
    queues.post(signal(1))
    queues.post(Event(EventId.DEVADD, 0))
    end = End()
    queues.open([end])
    assert handles(end) == [0, 1]  # DEVADD has priority 7
    assert end.signals == 1


def test_a_hostile_ring_ends_its_queue_alone() -> None:
    """Until NEGOTIATE: told once, counted, nothing piles up."""
    faults: list[tuple[int, str]] = []
    queues = EventQueues(lambda index, reason: faults.append((index, reason)))
    low, high = End(), End()
    queues.open([low, high])
    low.hostile = True
    queues.post(signal(1, 0), signal(2, 7))
    low.hostile = False
    for number in range(100):
        queues.post(signal(number, 0))
        queues.validate()
    assert faults == [(0, "ring fault: garbage")]
    assert (low.records, low.signals) == ([], 0)
    assert handles(high) == [2]
    assert queues.waiting == 0
    assert queues.statistics().lost == 101
    queues.reset()
    again = End()
    queues.open([again])
    queues.post(signal(7, 0))
    assert handles(again) == [7]


def test_reset_forgets_what_waits(queues: EventQueues) -> None:
    end = End(room=0)
    queues.open([end])
    event = signal(1)
    queues.post(event)
    queues.reset()
    queues.validate()
    assert not event.waiting
    assert not queues.opened
    queues.room(0)  # a doorbell that was under way
    fresh = End()
    queues.open([fresh])
    assert fresh.records == []


class QueueMachine(RuleBasedStateMachine):
    """Random posts, closes, drains and doorbells against a slow model."""

    @initialize(count=st.integers(1, 8), rooms=st.lists(st.integers(1, 3), min_size=8))
    def start(self, count: int, rooms: list[int]) -> None:
        self.queues = EventQueues(lambda *_: None)
        self.ends = [End(room) for room in rooms[:count]]
        self.signals = {n: signal(n, n % 10) for n in range(20)}
        self.closed: set[int] = set()
        self.owed: dict[int, deque[int]] = {n: deque() for n in range(20)}
        self.seen: dict[int, list[int]] = {n: [] for n in range(20)}
        self.queues.open(self.ends)

    @rule(number=st.integers(0, 19))
    def post(self, number: int) -> None:
        if number not in self.closed:
            if not self.signals[number].waiting:
                self.owed[number].append(EventId.SHMSIGNAL)
            self.queues.post(self.signals[number])

    @rule(number=st.integers(0, 19))
    def close(self, number: int) -> None:
        if number in self.closed:
            return
        self.closed.add(number)
        if self.signals[number].waiting:
            self.owed[number].pop()
        self.owed[number].append(EventId.SHMCLOSE)
        self.queues.close(self.signals[number], number)

    @rule(index=st.integers(0, 7))
    def drain(self, index: int) -> None:
        if index < len(self.ends):
            self._take(self.ends[index])
            self.queues.room(index)

    def _take(self, end: End) -> None:
        for eventid, number in end.take():
            assert self.owed[number].popleft() == eventid
            self.seen[number].append(eventid)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "queues"):
            self.queues.validate()

    def teardown(self) -> None:
        if not hasattr(self, "queues"):
            return
        while self.queues.waiting or any(end.records for end in self.ends):
            for index, end in enumerate(self.ends):
                self._take(end)
                self.queues.room(index)
        assert not any(self.owed.values()), "an event was lost"
        for number in self.closed:
            assert self.seen[number][-1] == EventId.SHMCLOSE
            assert self.seen[number].count(EventId.SHMCLOSE) == 1


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
