"""Rings under trio: wait for messages, wait for room, as few wake-ups as possible.

An end wants notifications only while it sleeps. Before that it may spin for a moment,
as long as that pays off: a sleep costs tens of microseconds on both sides.
"""

import time
from array import array
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import trio

from ioq.ring import Ring

_HEAD, _TAIL = 0, 1
_POLL_NS = 5_000
_TURN_NS = 50_000

_turn_ends: ContextVar[int] = ContextVar("_turn_ends", default=0)
"""Until when this task may go on without letting others run."""


class Wakeable(Protocol):
    """What wakes an end: a `Doorbell`, or anything that remembers being rung."""

    async def wait(self) -> object:
        """Return once rung since the last return; may return too often."""


class AdaptiveSpin:
    """How long to look before sleeping: longer while it pays off, up to `limit_us`.

    Between short looks it lets other tasks run.
    """

    def __init__(self, limit_us: float = 50.0) -> None:
        self._limit_ns = int(limit_us * 1000)
        self._budget_ns = self._limit_ns

    @property
    def budget_us(self) -> float:
        """What the next spin may take."""
        return self._budget_ns / 1000

    async def look(self, poll: Callable[[int], bool]) -> bool:
        """Call `poll(nanoseconds)` until it succeeds or the budget is used up."""
        end = time.perf_counter_ns() + self._budget_ns
        while (rest := end - time.perf_counter_ns()) > 0:
            if poll(min(rest, _POLL_NS)):
                return True
            await trio.lowlevel.checkpoint()
            _begin_turn()
        return False

    def learn(self, waited_ns: int) -> None:
        """Adapt to how long the wait lasted in the end, asleep or not.

        Twice the limit, since a sleep that lasted that long was mostly wake-up cost.
        """
        if waited_ns <= 2 * self._limit_ns:
            self._budget_ns = min(self._limit_ns, 2 * self._budget_ns + _POLL_NS)
        else:
            self._budget_ns //= 2
            if self._budget_ns < _POLL_NS:
                self._budget_ns = 0


@dataclass(frozen=True)
class WaitStatistics:
    """Waits that found nothing at first, and sleeps; a spin may spare the sleep."""

    waits: int
    sleeps: int


def _begin_turn() -> None:
    _turn_ends.set(time.perf_counter_ns() + _TURN_NS)


async def _take_turns() -> None:
    if time.perf_counter_ns() >= _turn_ends.get():
        await trio.lowlevel.cancel_shielded_checkpoint()
        _begin_turn()


class _RingEnd:
    """What consumer and producer share: waiting until our position is ours."""

    def __init__(
        self, ring: Ring, doorbell: Wakeable, spin: AdaptiveSpin | None, end: int
    ) -> None:
        self.ring = ring
        self._doorbell = doorbell
        self._spin = spin
        self._end = end
        self._ready = ring.room if end == _TAIL else ring.owned
        self._waits = self._sleeps = 0

    async def wait(self) -> None:
        """Return when there is something to do. Raises `RingFault`.

        Always lets a cancellation in; lets other tasks run when it has to wait, and
        every 50 microseconds if it never has to.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._ready():
            await _take_turns()
            return
        self._waits += 1
        start = time.perf_counter_ns()
        await self._until_ready()
        if self._spin is not None:
            self._spin.learn(time.perf_counter_ns() - start)
        await _take_turns()

    async def _until_ready(self) -> None:
        while not (await self._look() or await self._sleep()):
            pass  # woken for nothing

    async def _look(self) -> bool:
        if self._spin is None:
            return False
        return await self._spin.look(lambda ns: self.ring._spin(self._end, ns))

    async def _sleep(self) -> bool:
        """Ask to be notified, look once more, sleep: whether our position is ours."""
        try:
            if self.ring._arm(self._end):
                return True
            self._sleeps += 1
            await self._doorbell.wait()
            _begin_turn()
        finally:
            self.ring.disable()
        return self._ready()

    def statistics(self) -> WaitStatistics:
        """A snapshot of the counters."""
        return WaitStatistics(self._waits, self._sleeps)


class RingConsumer(_RingEnd):
    """Receives from a ring in batches; one task at a time."""

    def __init__(
        self, ring: Ring, doorbell: Wakeable, spin: AdaptiveSpin | None = None
    ) -> None:
        super().__init__(ring, doorbell, spin, _HEAD)

    async def receive(
        self,
        payload: bytearray | memoryview,
        sizes: "array[int] | memoryview",
        *,
        repost: int | None = None,
    ) -> int:
        """Take at least one message: as many as lie ready and fit (`Ring.consume`).

        Tells the peer that there is room again. Cancelled, it has taken nothing.
        """
        taken = 0
        while not taken:  # a peer may take back what made us ready
            await self.wait()
            taken = self.ring.consume(payload, sizes, len(sizes), repost)
        self.ring.signal.inject()
        return taken


class RingProducer(_RingEnd):
    """Sends to a ring in batches, waiting for room; one task at a time."""

    def __init__(
        self, ring: Ring, doorbell: Wakeable, spin: AdaptiveSpin | None = None
    ) -> None:
        super().__init__(ring, doorbell, spin, _TAIL)

    async def send(
        self,
        payload: bytes | bytearray | memoryview,
        sizes: "int | array[int] | memoryview",
        *,
        slots: tuple[int, int] | None = None,
    ) -> None:
        """Send all messages (`Ring.produce`), signalling once per batch handed over.

        Cancelled, some of them may have gone.
        """
        count = len(payload) // sizes if isinstance(sizes, int) else len(sizes)
        while True:
            await self.wait()
            sent = self.ring.produce(payload, sizes, slots)
            self.ring.signal.inject()
            if sent == count:
                return
            count -= sent
            if isinstance(sizes, int):
                payload = memoryview(payload)[sent * sizes :]
            else:
                payload = memoryview(payload)[sum(sizes[:sent]) :]
                sizes = memoryview(sizes)[sent:]
