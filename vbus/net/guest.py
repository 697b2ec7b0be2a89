"""The driver's side of a venet connection: pump frames between its rings and a TAP.

The rings and pools are the caller's, already shared with the device; nothing here
knows how. `GuestEnd` does the work, this does the waiting.
"""

from dataclasses import dataclass

import trio

from ioq import AdaptiveSpin, Ring, RingConsumer, Wakeable
from vbus.net._core import BATCH, FrameBatch, GuestEnd
from vbus.net.tap import Tap

_TAIL = 1


@dataclass(frozen=True)
class GuestStatistics:
    """Frames the guest sent (tx) and received (rx).

    `tx_errors` could not be sent in the negotiated format; `rx_errors` were malformed;
    `bad_events` named no frame of ours.
    """

    tx_frames: int
    tx_bytes: int
    tx_errors: int
    rx_frames: int
    rx_bytes: int
    rx_errors: int
    bad_events: int


@dataclass(frozen=True)
class GuestRings:
    """The rings with what wakes this side: `events` and `pages` if negotiated."""

    tx: Ring
    rx: Ring
    tx_wake: Wakeable
    rx_wake: Wakeable
    events: Ring | None = None
    events_wake: Wakeable | None = None
    pages: Ring | None = None


class GuestPump:
    """Moves frames both ways until cancelled. `end` has all its parts attached."""

    def __init__(
        self, end: GuestEnd, rings: GuestRings, *, txc: bool, spin_us: float = 0.0
    ) -> None:
        """Wrap an end that was posted or not yet; `txc`: completions come as events."""
        self.end = end
        self._rings = rings
        self._txc = txc
        self._spin_us = spin_us
        self._freed = trio.Event()
        self._rx = RingConsumer(rings.rx, rings.rx_wake, self._spin())
        self._events: RingConsumer | None = None
        if rings.events is not None and rings.events_wake is not None:
            self._events = RingConsumer(rings.events, rings.events_wake, self._spin())

    def _spin(self) -> AdaptiveSpin | None:
        return AdaptiveSpin(self._spin_us) if self._spin_us else None

    def post(self) -> None:
        """Give the device its empty buffers, once, before LINKUP."""
        self.end.post()
        if self._rings.pages is not None:
            self._rings.pages.signal.inject()

    async def run(self, tap: Tap | None) -> None:
        """Pump until cancelled; without a TAP only take events, for who uses `send`.

        Raises RingFault when the device broke a ring.
        """
        async with trio.open_nursery() as nursery:
            if tap is not None:
                nursery.start_soon(self._receive, tap)
                nursery.start_soon(self._transmit, tap)
            if self._events is not None:
                nursery.start_soon(self._take_events, self._events)

    async def wait(self) -> None:
        """Wait until a frame was received. Raises RingFault."""
        await self._rx.wait()

    def receive(self, batch: FrameBatch) -> int:
        """Describe received frames; `done` gives their buffers back."""
        return self.end.collect(batch)

    def done(self) -> None:
        """Hand the buffers of the last `receive` back and tell the device."""
        pages = self.end.release()
        self._rings.rx.signal.inject()
        if pages and self._rings.pages is not None:
            self._rings.pages.signal.inject()

    async def _receive(self, tap: Tap) -> None:
        batch = FrameBatch()
        while True:
            await self.wait()
            if self.receive(batch):
                tap.end.deliver(batch, 0, len(batch))
                self.done()

    async def _transmit(self, tap: Tap) -> None:
        while True:
            self._reap()
            if self.end.pull(tap.end, BATCH):
                self._rings.tx.signal.inject()
                await trio.lowlevel.checkpoint()
            elif self.end.full:
                await self.room()
            else:
                await tap.wait()

    def send(self, batch: FrameBatch, first: int, count: int) -> int:
        """Copy frames into the TX ring and tell the device: how many had room."""
        self._reap()
        sent = self.end.deliver(batch, first, count)
        if sent:
            self._rings.tx.signal.inject()
        return sent

    async def room(self) -> None:
        """Wait until one more frame can be sent; with `txc`, `run` must be running."""
        self._reap()
        while self.end.full:
            if self._txc:
                await self._freed.wait()
            else:
                await self._completed()
            self._reap()

    async def _completed(self) -> None:
        ring = self._rings.tx
        try:
            ring._arm(_TAIL)
            self._reap()
            if self.end.full:
                await self._rings.tx_wake.wait()
        finally:
            ring.disable()

    async def _take_events(self, events: RingConsumer) -> None:
        while True:
            await events.wait()
            self._reap()
            self._freed.set()
            self._freed = trio.Event()
            await trio.lowlevel.checkpoint()

    def _reap(self) -> None:
        if self.end.reap() and self._rings.events is not None:
            self._rings.events.signal.inject()

    def statistics(self) -> GuestStatistics:
        """A snapshot of the counters."""
        return GuestStatistics(*self.end._counters())
