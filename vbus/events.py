"""The event queues towards one guest: prioritised, coalescing, without loss.

A pure state machine. An Event is posted and waits in the FIFO of its priority until
its queue's ring has room. Queue i of N takes priority i; the last takes all from N-1
up, higher ones first. What an event object can be, and what leads on:

    idle --post--> waiting --ring has room--> idle
    waiting --post--> waiting                              no effect
    idle or waiting --close--> waiting, as SHMCLOSE        in its place if it waited

and a queue:

    flowing --ring full--> stalled --guest rings--> flowing
    flowing or stalled --hostile ring--> faulted, for good: its events are dropped

Before the queues are opened (QREG) everything waits.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shm import Gauge
from vbus.abi import EVENT, PRIORITY_HIGHEST, EventId
from vbus.abi import Event as EventRecord
from vbus.errors import InvalidError, VbusError

PRIORITIES = PRIORITY_HIGHEST + 1


class Event:
    """One event object: in a queue at most once, however often it is posted."""

    __slots__ = ("priority", "record", "waiting")

    def __init__(
        self,
        eventid: EventId,
        handle: int,
        text: bytes = b"",
        priority: int = PRIORITY_HIGHEST,
    ) -> None:
        """Make an idle event; a priority beyond the highest counts as the highest."""
        self.record = EVENT.pack(EventRecord(eventid, handle, text))
        self.priority = min(priority, PRIORITY_HIGHEST)
        self.waiting = False

    @classmethod
    def of(cls, record: bytes, priority: int) -> "Event":
        """Make one of a record as it is. Raises InvalidError for what is none."""
        if len(record) != EVENT.size:
            raise InvalidError(f"an event of {len(record)} bytes")
        self = cls(EventId.SHMSIGNAL, 0, priority=priority)
        self.record = record
        return self


class QueueEnd(Protocol):
    """The ring that one queue leads to."""

    def put(self, record: bytes) -> bool:
        """Hand one record over; False: no room. A VbusError faults the queue."""
        ...

    def signal(self) -> None:
        """Tell the guest about what was put."""
        ...

    def ask_for_room(self) -> None:
        """Have `EventQueues.room` called once the guest may have made room."""
        ...

    def stop_asking(self) -> None:
        """Undo `ask_for_room`; called first when the guest rings."""
        ...


@dataclass(frozen=True, slots=True)
class EventStatistics:
    """Counters of a guest's event queues, over all its resets."""

    posted: int
    """Events taken."""
    coalesced: int
    """Posts of an event which was still waiting."""
    delivered: int
    """Records put into a ring."""
    stalls: int
    """Times a ring was found full."""
    faults: int
    """Queues given up because of what the guest wrote."""
    lost: int
    """Events dropped with a faulted queue."""
    waiting: Gauge
    """Events in the backlog now."""
    most_waiting: Gauge


class _Queue:
    __slots__ = ("end", "fault", "fifos", "stalled")

    def __init__(self, end: QueueEnd, fifos: Sequence[deque[Event]]) -> None:
        self.end = end
        self.fifos = fifos
        self.stalled = False
        self.fault: str | None = None

    def first(self) -> deque[Event] | None:
        """Give the FIFO whose turn it is; None if nothing waits."""
        for fifo in self.fifos:
            if fifo:
                return fifo
        return None


class EventQueues:
    """All event queues of one guest."""

    def __init__(self, faulted: Callable[[int, str], object]) -> None:
        """Start closed; `faulted(index, reason)` is called when a queue is given up."""
        self._faulted = faulted
        self._fifos: list[deque[Event]] = [deque() for _ in range(PRIORITIES)]
        self._queues: list[_Queue] = []
        self._waiting = 0
        self._most_waiting = 0
        self._posted = self._coalesced = self._delivered = 0
        self._stalls = self._faults = self._lost = 0

    @property
    def opened(self) -> bool:
        return bool(self._queues)

    @property
    def waiting(self) -> int:
        """Events in the backlog."""
        return self._waiting

    def fault(self, index: int) -> str | None:
        """Say why queue `index` was given up."""
        return self._queues[index].fault

    def open(self, ends: Sequence[QueueEnd]) -> None:
        """Take the rings of QREG, lowest priority first, and deliver what waits."""
        last = len(ends) - 1
        for index, end in enumerate(ends):
            top = PRIORITY_HIGHEST if index == last else index
            fifos = [self._fifos[priority] for priority in range(top, index - 1, -1)]
            self._queues.append(_Queue(end, fifos))
        for index in range(last, -1, -1):
            self._flush(index)

    def post(self, *events: Event) -> None:
        """Queue events, to be delivered in this order if of one priority.

        An event that waits already stays where it is: it will tell the same.
        """
        for event in events:
            if event.waiting:
                self._coalesced += 1
                continue
            self._posted += 1
            event.waiting = True
            self._fifos[event.priority].append(event)
            self._waiting += 1
        self._most_waiting = max(self._most_waiting, self._waiting)
        if self._queues:
            for index in {self._index(event.priority) for event in events}:
                self._flush(index)

    def close(self, event: Event, cookie: int) -> None:
        """Turn a signal's event into its SHMCLOSE, in its place if it still waits."""
        event.record = EVENT.pack(EventRecord(EventId.SHMCLOSE, cookie))
        if not event.waiting:
            self.post(event)

    def backlog(self) -> list[Event]:
        """Give what waits; of one priority, the oldest first."""
        return [event for fifo in self._fifos for event in fifo]

    def room(self, index: int) -> None:
        """The guest rang for queue `index`: go on if it was stalled."""
        if index >= len(self._queues):
            return
        queue = self._queues[index]
        if queue.stalled:
            queue.stalled = False
            self._guarded(index, queue.end.stop_asking)
            self._flush(index)

    def reset(self) -> None:
        """Forget the rings and all that waits, without a word to the guest."""
        self._queues.clear()
        for fifo in self._fifos:
            for event in fifo:
                event.waiting = False
            fifo.clear()
        self._waiting = 0

    def statistics(self) -> EventStatistics:
        return EventStatistics(
            posted=self._posted,
            coalesced=self._coalesced,
            delivered=self._delivered,
            stalls=self._stalls,
            faults=self._faults,
            lost=self._lost,
            waiting=self._waiting,
            most_waiting=self._most_waiting,
        )

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        queued = [event for fifo in self._fifos for event in fifo]
        assert len(queued) == self._waiting <= self._most_waiting
        assert len({id(event) for event in queued}) == len(queued)
        assert all(event.waiting for event in queued)
        for priority, fifo in enumerate(self._fifos):
            assert all(event.priority == priority for event in fifo)
        covered = [id(fifo) for queue in self._queues for fifo in queue.fifos]
        assert sorted(covered) == sorted(map(id, self._fifos if self._queues else ()))
        for queue in self._queues:
            assert bool(queue.first()) == queue.stalled
            assert not (queue.stalled and queue.fault)
        assert self._delivered + self._lost + self._waiting <= self._posted

    def _index(self, priority: int) -> int:
        return min(priority, len(self._queues) - 1)

    def _flush(self, index: int) -> None:
        """Put what waits into the ring, as far as there is room, then signal once."""
        queue = self._queues[index]
        if queue.fault is not None:
            self._drop(queue)
        elif not queue.stalled and queue.first() is not None:
            self._guarded(index, lambda: self._fill(queue))

    def _fill(self, queue: _Queue) -> None:
        put = 0
        while (fifo := queue.first()) is not None:
            if not queue.end.put(fifo[0].record):
                self._stalls += 1
                queue.stalled = True
                queue.end.ask_for_room()
                break
            fifo.popleft().waiting = False
            self._waiting -= 1
            self._delivered += 1
            put += 1
        if put:
            queue.end.signal()

    def _guarded(self, index: int, step: Callable[[], None]) -> None:
        """Run a step on a ring; a hostile ring ends its queue and nothing else."""
        queue = self._queues[index]
        try:
            step()
        except VbusError as error:
            queue.fault = str(error)
            queue.stalled = False
            self._faults += 1
            self._drop(queue)
            self._faulted(index, queue.fault)

    def _drop(self, queue: _Queue) -> None:
        for fifo in queue.fifos:
            for event in fifo:
                event.waiting = False
            self._lost += len(fifo)
            self._waiting -= len(fifo)
            fifo.clear()
