"""One open connection of a venet: what was negotiated and shared, and the pumping.

All of ABI section 7 that is not moving bytes. The states of a session:

    negotiating --LINKUP--> up <--LINKUP/LINKDOWN--> down     (rings live on, 7.9)
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import Final

import msgspec
import trio

from backends.venet.flag import Flag
from ioq import AdaptiveSpin, RingFault
from vbus.device import Connection, SharedMemory
from vbus.errors import (
    ExistsError,
    InvalidError,
    NotFoundError,
    ProtocolError,
    VbusError,
    innermost,
)
from vbus.net import FrameBatch, HostEnd
from vbus.net._core import BELL_EVENTS, BELL_RX, BELL_TX

RING_LIMIT: Final = 2048
SG_SIZE: Final = 320
EVENT_SIZE: Final = 24
NUDGE_S: Final = 0.1
SPIN_US: Final = 200
"""Longer than a round trip with a sleep in it, or spinning would never set in."""


def parse_spin(value: object) -> int:
    """Take microseconds, up to 10 ms."""
    spin_us = int(str(value))
    if not 0 <= spin_us <= 10_000:
        raise InvalidError(f"{spin_us} is not between 0 and 10000")
    return spin_us


def spin(spin_us: int) -> AdaptiveSpin | None:
    """A spin of at most so long before sleeping; it ends by itself where it is idle."""
    return AdaptiveSpin(spin_us) if spin_us else None


class Shm(IntEnum):
    """Ids of shared memory (7.1)."""

    RX = 0
    TX = 1
    TX_POOL = 100
    EVENT_POOL = 101
    EVENTS = 102
    RX_POOL = 103
    PAGES = 104


class Group(IntEnum):
    """Capability groups (7.2)."""

    SG = 0
    EVENTQ = 1
    L4RO = 2


class Sg(IntFlag):
    """Capability bits of the groups SG and L4RO."""

    SG = 1
    TSO4 = 2
    TSO6 = 4
    ECN = 8
    UFO = 16
    PMTD = 32


class Eventq(IntFlag):
    """Capability bits of the group EVENTQ."""

    LINKSTATE = 1
    TXC = 2


_SEGMENTS = Sg.SG | Sg.TSO4 | Sg.TSO6 | Sg.ECN
OFFERED: Final[Mapping[Group, int]] = {
    Group.SG: _SEGMENTS | Sg.PMTD,
    Group.EVENTQ: Eventq.LINKSTATE | Eventq.TXC,
    Group.L4RO: _SEGMENTS,
}

_CAPABILITIES = struct.Struct("<II")
_QUERY = struct.Struct("<IIII16x")
_RINGS = {Shm.RX, Shm.TX, Shm.EVENTS, Shm.PAGES}


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    accepted: dict[int, int]
    up: bool


_SAVED: Final = msgspec.msgpack.Decoder(_Saved)


class Session:
    """A connection's state; `end` moves the frames."""

    def __init__(
        self,
        connection: Connection,
        end: HostEnd,
        offered: Mapping[Group, int],
        spin_us: int,
    ) -> None:
        self.connection = connection
        self.end = end
        self.up = Flag()
        self.signals = 0
        self._offered = offered
        self._spin_us = spin_us
        self._accepted: dict[Group, int] = dict.fromkeys(Group, 0)
        self._shared: dict[Shm, SharedMemory] = {}
        self._bells: tuple[tuple[int, Shm], ...] = (
            (BELL_RX, Shm.RX),
            (BELL_TX, Shm.TX),
            (BELL_EVENTS, Shm.EVENTS),
        )
        self._deferred = Flag()
        self._fault: RingFault | None = None
        self._broken = trio.Event()

    # Device calls (7.2)

    def negotiate(self, data: bytes) -> bytes:
        """NEGCAP."""
        if len(data) != _CAPABILITIES.size or self.up.value:
            raise InvalidError("NEGCAP: wrong length, or the link is up")
        group, bits = _CAPABILITIES.unpack(data)
        if group not in self._accepted:
            return _CAPABILITIES.pack(group, 0)
        self._accepted[Group(group)] = bits & self._offered.get(Group(group), 0)
        self._configure()
        return _CAPABILITIES.pack(group, self._accepted[Group(group)])

    def _configure(self) -> None:
        tx, events, rx = (self._accepted[group] for group in Group)
        self.end.configure(tx, rx, bool(events), bool(events & Eventq.TXC))

    def _check_query(self, data: bytes) -> None:
        if len(data) != _QUERY.size or self.up.value or _QUERY.unpack(data)[0]:
            raise InvalidError("query: wrong length or flags, or the link is up")

    def query_events(self, data: bytes) -> bytes:
        """EVQQUERY."""
        self._check_query(data)
        return _QUERY.pack(0, EVENT_SIZE, Shm.EVENT_POOL, Shm.EVENTS)

    def query_l4ro(self, data: bytes) -> bytes:
        """L4ROQUERY."""
        self._check_query(data)
        return _QUERY.pack(0, Shm.RX_POOL, Shm.PAGES, 0)

    def link_up(self) -> None:
        """LINKUP."""
        if self.up.value:
            raise ExistsError("the link is up already")
        if Shm.RX not in self._shared or Shm.TX not in self._shared:
            raise InvalidError("LINKUP before the rings are shared")
        self.end.set_up(True)
        self.up.set(True)
        self._send_link_state(True)

    def link_down(self) -> None:
        """LINKDOWN."""
        if not self.up.value:
            raise NotFoundError("the link is not up")
        self.end.set_up(False)
        self.up.set(False)

    def _send_link_state(self, up: bool) -> None:
        if self._accepted[Group.EVENTQ] & Eventq.LINKSTATE:
            self.ring_bells(self.end.link_event(up))

    def flush_rx(self) -> None:
        """FLUSHRX; 0 with the link down too (12.1)."""
        self.end.flush_rx()

    # For another process

    def save(self) -> bytes:
        """Say what was agreed on; where the rings stand is in the record."""
        agreed = {int(group): bits for group, bits in self._accepted.items()}
        return msgspec.msgpack.encode(_Saved(agreed, self.up.value))

    def resume(self, state: bytes, shared: Sequence[SharedMemory]) -> None:
        """Go on where another process was. Raises VbusError, RingFault."""
        try:
            saved = _SAVED.decode(state)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"no state of a venet: {error}") from None
        for group in Group:
            bits = saved.accepted.get(group, 0)
            self._accepted[group] = bits & self._offered.get(group, 0)
        self._configure()
        for shm in shared:
            self.share(shm)
        try:
            self.end.resume()
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        if saved.up and Shm.RX in self._shared and Shm.TX in self._shared:
            self.end.set_up(True)
            self.up.set(True)
        self._deferred.set(self.end.pending > 0)

    # Shared memory (7.1)

    def share(self, shm: SharedMemory) -> None:
        """Check memory against what was negotiated and make it part of `end`."""
        try:
            id = Shm(shm.id)
        except ValueError:
            raise InvalidError(f"no memory has the id {shm.id}") from None
        if id in self._shared:
            raise ExistsError(f"{id.name} is shared already")
        if id in _RINGS:
            self._share_ring(id, shm)
        else:
            self._share_pool(id, shm)
        self._shared[id] = shm

    def _share_ring(self, id: Shm, shm: SharedMemory) -> None:
        if id is Shm.EVENTS and Shm.EVENT_POOL not in self._shared:
            raise InvalidError("the event queue's pool comes first")
        ring = shm.ring(limit=RING_LIMIT)
        if (
            id is Shm.EVENTS
            and ring.count * EVENT_SIZE != self._shared[Shm.EVENT_POOL].size
        ):
            raise InvalidError(f"{ring.count} events do not fill the pool")
        self.end.attach(id.name.lower(), ring)

    def _share_pool(self, id: Shm, shm: SharedMemory) -> None:
        needed = {
            Shm.TX_POOL: self._accepted[Group.SG] & Sg.PMTD,
            Shm.EVENT_POOL: self._accepted[Group.EVENTQ],
            Shm.RX_POOL: self._accepted[Group.L4RO],
        }
        if shm.signal is not None or not needed[id]:
            raise InvalidError(f"{id.name}: with a signal, or not negotiated")
        if id is Shm.RX_POOL and shm.size > RING_LIMIT * SG_SIZE:
            raise InvalidError(f"{id.name}: {shm.size} bytes are too many")
        self.end.attach(id.name.lower(), shm.view)

    # Guest-bound frames

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        """Copy frames into the guest; a broken ring ends this connection only."""
        try:
            self.end.deliver(batch, first, count)
        except RingFault as fault:
            self.fail(fault)

    def flush(self) -> None:
        """Signal the RX ring, once per batch."""
        self.ring_bells(self.end.signal_rx())

    def fail(self, fault: RingFault) -> None:
        """Let `run` end with this fault."""
        self.end.set_up(False)
        self._fault = fault
        self._broken.set()

    def ring_bells(self, bells: int) -> None:
        """Cross the boundary for every signal that the core asks for."""
        for bell, id in self._bells:
            if bells & bell:
                self.signals += 1
                self._shared[id].notify()
        self._deferred.set(self.end.pending > 0)

    # Tasks

    async def run(self, forward: Callable[[FrameBatch], None]) -> None:
        """Pump frames from the guest to `forward` until cancelled.

        Raises RingFault when the guest broke a ring.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, forward)
                nursery.start_soon(self._flush_events)
                nursery.start_soon(self._remind)
                await self._broken.wait()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _cause(group) from None
        if self._fault is not None:
            raise self._fault

    async def _pump(self, forward: Callable[[FrameBatch], None]) -> None:
        consumer = await self.connection.consumer(Shm.TX, spin=spin(self._spin_us))
        batch = FrameBatch()
        while True:
            await self.up.wait(True)
            await consumer.wait()
            if self.end.collect(batch):
                forward(batch)
                self.ring_bells(self.end.release())
            elif self.end.blocked:
                await self._deferred.wait(False)

    async def _flush_events(self) -> None:
        """Deliver completions that found the event ring full, when it has room."""
        producer = await self.connection.producer(Shm.EVENTS)
        while True:
            await self._deferred.wait(True)
            await producer.wait()
            self.ring_bells(self.end.flush_events())

    async def _remind(self) -> None:
        """Signal RX once more after LINKUP: the guest may have polled too early.

        The Linux driver enables its polling only after LINKUP returned and loses a
        notification that comes in between (ABI 12.2).
        """
        while True:
            await self.up.wait(True)
            with trio.move_on_after(NUDGE_S):
                await self.up.wait(False)
                continue
            self.flush()
            await self.up.wait(False)


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to end with: the cancellation, else the one refusal; bugs as they came."""
    refusals, others = group.split(VbusError)
    if others is not None:
        return group if others.split(trio.Cancelled)[1] else others
    found = group if refusals is None else refusals
    return innermost(found)
