"""A guest's session on the bus, from NEGOTIATE to the next reset: what it has open.

Holds the two tables that a guest's numbers are looked up in, connections by handle and
shared memory by signal handle, and leads every connection through its life (`State`).
Knows nothing of registers and structures. A device's hook may be async; then the
operation gives a Waiting, which somebody awaits, instead of a result.
"""

import inspect
import logging
import mmap
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from errno import EIO
from typing import Any, NamedTuple, Protocol, cast

import outcome
import trio
from outcome import Error, Outcome, Value

from shm import AddressSpace, Doorbell, create_memfd
from vbus.abi import EventId
from vbus.asking import Result, ask, later, refusal
from vbus.bus import Interface
from vbus.connection import Connection, Ended, SharedMemory, State
from vbus.device import CallResult, Device
from vbus.effects import BridgeEffects
from vbus.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    VbusError,
)
from vbus.events import Event
from vbus.logs import DEVICE
from vbus.saved import Held, Kept, SavedConnection, SavedShm
from vbus.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)

SHM_LIMIT = 8192
SIGNAL_LIMIT = 4096
BACKLOG_LIMIT = 65536
HANDLE_LIMIT = 1 << 31


class Signal(NamedTuple):
    """The signal path of one shared memory, made by its DEVSHM (R5)."""

    shm: SharedMemory
    event: Event
    connection: Connection


class EventSink(Protocol):
    """Where events towards the guest go: its `EventQueues`."""

    @property
    def waiting(self) -> int: ...
    def post(self, *events: Event) -> None: ...
    def close(self, event: Event, cookie: int) -> None: ...


def random_handle() -> int:
    """Make a handle that says nothing and cannot be guessed."""
    return secrets.randbits(64)


@dataclass(slots=True)
class ClientCounters:
    """Counted over all sessions of a guest."""

    opens: int = 0
    closes: int = 0
    shares: int = 0
    calls: int = 0
    failures: int = 0
    doorbells: int = 0
    bad_doorbells: int = 0


def _errno_of(error: BaseException) -> int:
    """Give what the guest is answered."""
    return error.errno if isinstance(error, VbusError) else EIO


class BusClient:
    """One session of one guest."""

    def __init__(
        self,
        guest: str,
        memory: AddressSpace,
        events: EventSink,
        effects: BridgeEffects,
        counters: ClientCounters,
        *,
        timeout_s: float,
        new_handle: Callable[[], int] = random_handle,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.alive = True
        self.connections: dict[int, Connection] = {}
        self.signals: dict[int, Signal] = {}
        self._guest = guest
        self._memory = memory
        self._events = events
        self._effects = effects
        self._counters = counters
        self._timeout_s = timeout_s
        self._new_handle = new_handle
        self._trace = trace
        self._opening: set[Connection] = set()
        self._closing: set[Connection] = set()
        self._next_signal = 0
        self._shm_count = 0
        self._signal_count = 0
        self._areas: dict[Connection, int] = {}

    def connection(self, handle: int) -> Connection:
        """Find an open connection of this very guest. Raises NotFoundError (R3)."""
        try:
            return self.connections[handle]
        except KeyError:
            raise NotFoundError(f"{self._guest}: no handle {handle:#x}") from None

    # Open

    def open(
        self,
        interface: Interface,
        version: int,
        tell: Callable[[Connection], None],
        prepare: Callable[[Connection], object] | None = None,
    ) -> Result:
        """Open a device; `tell` writes the handle to the guest.

        `prepare` is called with the connection before the device is, and gives it its
        area; without it that is done here.
        """
        device = interface.device
        if version != device.version:
            raise InvalidError(f"{device.name}: version {version} is not its ABI")
        if len(device.connections) >= device.max_connections:
            raise BusyError(f"{device.name} is open already")
        connection = Connection(device, self._guest, version, self._memory)
        if prepare is not None:
            prepare(connection)
        elif device.area_size:
            self._give_area(connection, self._new_area(device.area_size))
        device.connections.add(connection)
        self._opening.add(connection)
        started = time.perf_counter_ns()

        def finish(answer: Outcome[None]) -> int:
            answer.unwrap()
            if connection.state is not State.OPEN:
                raise NotFoundError(f"{connection}: ended while it was opened")
            try:
                tell(connection)
            except VbusError:
                self.end(connection, Ended.FAILED)
                raise
            return 0

        return ask(
            device,
            lambda: device.open(connection),
            finish,
            lambda: f"open of {device.name} by {self._guest}",
            ended=lambda answer: self._opened(connection, answer, started),
        )

    def go_on(
        self,
        interface: Interface,
        version: int,
        shared: Sequence[SharedMemory],
        state: bytes,
        prepare: Callable[[Connection], object],
    ) -> Result:
        """Go on with a connection that another process had, and its memories.

        `prepare` is called with the connection before the device is.
        """
        device = interface.device
        connection = Connection(device, self._guest, version, self._memory)
        prepare(connection)
        device.connections.add(connection)
        self._opening.add(connection)
        started = time.perf_counter_ns()
        for shm in shared:
            connection.sharing[shm.id] = shm
            self._shm_count += 1
            self._signal_count += shm.signal is not None

        def ended(answer: Outcome[None]) -> None:
            self._opened(connection, answer, started)
            if connection.state is not State.OPEN:
                return
            for shm in shared:
                event = Event(EventId.SHMSIGNAL, shm.cookie, priority=shm.prio)
                path = Signal(shm, event, connection)
                self._shared(connection, path, answer, started)

        def finish(answer: Outcome[None]) -> int:
            answer.unwrap()
            if connection.state is not State.OPEN:
                raise NotFoundError(f"{connection}: ended while it was resumed")
            return 0

        return ask(
            device,
            lambda: device.resume(connection, state, shared),
            finish,
            lambda: f"resuming {device.name} for {self._guest}",
            ended=ended,
        )

    def _opened(
        self, connection: Connection, answer: Outcome[None], started: int
    ) -> None:
        self._opening.discard(connection)
        connection.device.meter.opens += 1
        if self._trace.on:
            self._record("open", connection, connection.version, 0, answer, started)
        if isinstance(answer, Error):
            self.release(connection)
            self._forget(connection)
        elif connection.state is State.ABORTED:
            connection.state = State.CLOSING
            self._close_hook(connection)
        else:
            connection.handle = self._unused_handle()
            connection.state = State.OPEN
            self.connections[connection.handle] = connection
            self._counters.opens += 1
            self._effects.connection_opened(connection)

    def _unused_handle(self) -> int:
        while True:
            handle = self._new_handle()
            if handle and handle not in self.connections:
                return handle

    # Call

    def call(
        self,
        handle: int,
        func: int,
        data: bytes,
        flags: int,
        reply: Callable[[bytes], None],
    ) -> Result:
        """Call a device; `reply` writes what it answers into the guest's buffer."""
        connection = self.connection(handle)
        device = connection.device
        self._counters.calls += 1
        started = time.perf_counter_ns()
        # What `ask` does, without anything made for each call: most are plain.
        token = DEVICE.set(device.name)
        try:
            try:
                answer = device.call(connection, func, data, flags)
            except Exception as error:
                self._called(connection, func, data, started, error)
                raise
            if hasattr(answer, "__await__"):
                asked = cast(Awaitable[CallResult], answer)
                return self._call_later(connection, func, data, reply, asked, started)
            self._called(connection, func, data, started, None)
            return _answer(answer, device, reply)
        except Exception as error:
            return refusal(error, lambda: self._call_of(device, func))
        finally:
            DEVICE.reset(token)

    def _call_later(
        self,
        connection: Connection,
        func: int,
        data: bytes,
        reply: Callable[[bytes], None],
        asked: Awaitable[CallResult],
        started: int,
    ) -> Result:
        device = connection.device

        def ended(answer: Outcome[CallResult]) -> None:
            error = answer.error if isinstance(answer, Error) else None
            self._called(connection, func, data, started, error)

        return later(
            device,
            asked,
            lambda answer: _answer(answer.unwrap(), device, reply),
            lambda: self._call_of(device, func),
            ended,
        )

    def _call_of(self, device: Device, func: int) -> str:
        return f"call {func} of {device.name} by {self._guest}"

    def _called(
        self,
        connection: Connection,
        func: int,
        data: bytes,
        started: int,
        error: BaseException | None,
    ) -> None:
        took = time.perf_counter_ns() - started
        connection.device.meter.called(took, error is not None)
        if self._trace.on:
            answer = Value(None) if error is None else Error(error)
            self._record("call", connection, func, len(data), answer, started)

    def _record(
        self,
        kind: str,
        connection: Connection,
        number: int,
        size: int,
        answer: Outcome[Any],
        started: int,
    ) -> None:
        """Trace what a device was asked and how it answered."""
        took = time.perf_counter_ns() - started
        device = connection.device.name
        result = -_errno_of(answer.error) if isinstance(answer, Error) else 0
        self._trace.record(kind, self._guest, device, number, size, result, took)

    # Share

    def share(
        self,
        handle: int,
        id: int,
        make: Callable[[Callable[[], object]], SharedMemory],
        signal: tuple[int, int] | None,
    ) -> Result:
        """Share the memory that `make(post)` gives; `signal` is (prio, cookie)."""
        connection = self.connection(handle)
        if id in connection.shm or id in connection.sharing:
            raise ExistsError(f"{connection}: {id} is shared already")
        self._check_limits(signal is not None)
        prio, cookie = signal or (0, 0)
        event = Event(EventId.SHMSIGNAL, cookie, priority=prio)
        try:
            shm = make(self._poster(connection, id, event))
        except OSError as error:
            raise NoSpaceError(f"{self._guest}: no doorbell: {error}") from None
        connection.sharing[id] = shm
        started = time.perf_counter_ns()
        self._shm_count += 1
        self._signal_count += signal is not None

        def finish(answer: Outcome[None]) -> int:
            answer.unwrap()
            if not shm.accepted:
                raise NotFoundError(f"{connection}: ended while {id} was shared")
            return shm.handle or 0

        return ask(
            connection.device,
            lambda: connection.device.share(connection, shm),
            finish,
            lambda: f"share {id} with {connection.device.name} by {self._guest}",
            ended=lambda answer: self._shared(
                connection, Signal(shm, event, connection), answer, started
            ),
        )

    def _poster(
        self, connection: Connection, id: int, event: Event
    ) -> Callable[[], object]:
        """Make what sends a memory's signal to the guest."""
        events, meter, trace = self._events, connection.device.meter, self._trace
        guest, device = self._guest, connection.device.name

        def post() -> None:
            meter.signals += 1
            meter.coalesced += event.waiting
            if trace.on:
                trace.record("signal", guest, device, id)
            events.post(event)

        return post

    def _check_limits(self, with_signal: bool) -> None:
        if self._shm_count >= SHM_LIMIT:
            raise NoSpaceError(f"{self._guest}: {SHM_LIMIT} memories are shared")
        if with_signal and (
            self._signal_count >= SIGNAL_LIMIT
            or self._next_signal >= HANDLE_LIMIT
            or self._events.waiting >= BACKLOG_LIMIT
        ):
            raise NoSpaceError(f"{self._guest}: too many signals")

    def _shared(
        self,
        connection: Connection,
        signal: Signal,
        answer: Outcome[None],
        started: int,
    ) -> None:
        shm = signal.shm
        connection.device.meter.shares += 1
        if self._trace.on:
            self._record("share", connection, shm.id, shm.size, answer, started)
        if connection.sharing.pop(shm.id, None) is None:
            return  # released with its connection meanwhile
        if isinstance(answer, Error) or connection.state is not State.OPEN:
            self._release_shm(shm)
            return
        if shm.signal is not None:
            shm.handle = self._next_signal
            self._next_signal += 1
            self.signals[shm.handle] = signal
        self._counters.shares += 1
        connection.add(shm)
        shm.accept()

    def _release_shm(self, shm: SharedMemory) -> None:
        shm.release()
        self._shm_count -= 1
        self._signal_count -= shm.signal is not None

    def ring(self, handle: int) -> None:
        """The guest signals a memory; an unknown handle is ignored (ABI 3.5)."""
        signal = self.signals.get(handle)
        if signal is None:
            self._counters.bad_doorbells += 1
        elif (doorbell := signal.shm.doorbell) is not None:
            self._counters.doorbells += 1
            doorbell.ring()
            if self._trace.on:
                at = signal.connection.device.name
                self._trace.record("ring", self._guest, at, signal.shm.id)

    # Close

    def close(self, handle: int) -> Result:
        """Close for the guest; the memory goes when the device let go of it."""
        connection = self.connection(handle)
        self._withdraw(connection, Ended.CLOSED)

        def ended(answer: Outcome[None]) -> None:
            self.release(connection)
            self._forget(connection)
            if isinstance(answer, Error):
                self._close_failed(connection, answer.error)

        return ask(
            connection.device,
            lambda: connection.device.close(connection),
            lambda _: 0,
            lambda: f"close of {connection.device.name} by {self._guest}",
            ended=ended,
        )

    def end(self, connection: Connection, reason: Ended) -> None:
        """End an open connection from our side; its memory goes at once."""
        self._withdraw(connection, reason)
        self._close_hook(connection)

    def drop(self, interface: Interface) -> None:
        """A device left the bus: end what this guest has open or opens there."""
        for connection in [*self._opening, *self.connections.values()]:
            if connection.device is interface.device:
                self._abort_or_end(connection, Ended.UNLINKED)

    def shutdown(self) -> None:
        """End the session: the guest was reset or is gone. No events."""
        self.alive = False
        for connection in [*self._opening, *self.connections.values()]:
            self._abort_or_end(connection, Ended.RESET)
        for connection in tuple(self._closing):
            self.release(connection)

    def _abort_or_end(self, connection: Connection, reason: Ended) -> None:
        if connection.state is State.OPENING:
            connection.state = State.ABORTED
        elif connection.state is State.OPEN:
            self.end(connection, reason)

    def _withdraw(self, connection: Connection, reason: Ended) -> None:
        """Take the handle away and stop the device's task."""
        del self.connections[connection.handle]
        # The task first: it is cancelled, rather than woken up to find the end.
        connection.ended = reason
        self._effects.connection_closed(connection, reason)
        connection.state = State.CLOSING
        self._closing.add(connection)
        self._counters.closes += 1
        if self._trace.on:
            device = connection.device.name
            self._trace.record("close", self._guest, device, connection.version)

    def _close_hook(self, connection: Connection) -> None:
        """Call the device's close, and take the memory before it can await."""
        answer = outcome.capture(connection.device.close, connection)
        self.release(connection)
        if isinstance(answer, Error):
            self._close_failed(connection, answer.error)
        elif answer.value is not None and inspect.isawaitable(answer.value):
            awaitable = answer.value
            self._effects.spawn(lambda: self._finish_close(connection, awaitable))
            return
        self._forget(connection)

    async def _finish_close(
        self, connection: Connection, awaitable: Awaitable[None]
    ) -> None:
        try:
            with trio.fail_after(self._timeout_s):
                await awaitable
        except Exception as error:
            self._close_failed(connection, error)
        finally:
            self._forget(connection)

    def _close_failed(self, connection: Connection, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error
        log.error("%r: its close failed", connection, exc_info=error)

    def release(self, connection: Connection) -> None:
        """End the use of the guest's memory; each signal ends in one SHMCLOSE."""
        self._closing.discard(connection)
        for shm in [*connection.shm.values(), *connection.sharing.values()]:
            self._release_shm(shm)
            if shm.handle is not None:
                signal = self.signals.pop(shm.handle)
                if self.alive:
                    self._events.close(signal.event, shm.cookie)
        connection.shm.clear()
        connection.sharing.clear()
        if connection in self._areas:
            assert connection.area is not None
            connection.area.clear()
            os.close(self._areas.pop(connection))

    def _new_area(self, size: int) -> int:
        """Make a memory file of whole pages."""
        try:
            return create_memfd("vbus-area", -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            raise NoSpaceError(f"{self._guest}: no area: {error.strerror}") from None

    def _give_area(self, connection: Connection, fd: int) -> None:
        """Map a memory file, which is owned from now on, as the connection's area."""
        area = AddressSpace()
        try:
            area.map(0, os.fstat(fd).st_size, fd)
        except BaseException:
            os.close(fd)
            raise
        connection.area = area
        self._areas[connection] = fd

    def _forget(self, connection: Connection) -> None:
        connection.state = State.CLOSED
        connection.device.connections.discard(connection)

    # Being replaced

    @property
    def busy(self) -> bool:
        """Does a device still open, share or close something?"""
        sharing = any(one.sharing for one in self.connections.values())
        return bool(self._opening or self._closing or sharing)

    @property
    def next_signal(self) -> int:
        """The handle that the next signal gets."""
        return self._next_signal

    def save(self, kept: Kept) -> tuple[SavedConnection, ...]:
        """Give what is open; what its device cannot save is ended before."""
        states = {one: self._state_of(one) for one in tuple(self.connections.values())}
        return tuple(
            SavedConnection(
                one.device.name,
                one.version,
                one.handle,
                tuple(_saved(shm, kept) for shm in one.shm.values()),
                states[one],
                kept.keep(self._areas[one]) if one in self._areas else None,
            )
            for one in self.connections.values()
        )

    def _state_of(self, connection: Connection) -> bytes:
        try:
            return connection.device.save(connection)
        except Exception:
            log.exception("%r cannot be saved", connection)
            self.end(connection, Ended.FAILED)
            return b""

    def resume(
        self,
        saved: Sequence[SavedConnection],
        next_signal: int,
        find: Callable[[str], Interface | None],
        held: Held,
    ) -> list[Event]:
        """Go on with what was open, and give the SHMCLOSE of what cannot be.

        `find` is None for a device that is not there. Raises a VbusError where the
        memory is not what it was.
        """
        self._next_signal = next_signal
        lost: list[Event] = []
        for one in saved:
            interface = find(one.device)
            if interface is None or one.version != interface.device.version:
                lost += [_ending(shm) for shm in one.shm if shm.handle is not None]
            else:
                self._resume(one, interface.device, held)
        return lost

    def _resume(self, saved: SavedConnection, device: Device, held: Held) -> None:
        connection = Connection(device, self._guest, saved.version, self._memory)
        if not saved.handle or saved.handle in self.connections:
            raise InvalidError(f"{connection}: handle {saved.handle:#x}")
        connection.handle = saved.handle
        connection.state = State.OPEN
        device.connections.add(connection)
        self.connections[saved.handle] = connection
        self._effects.connection_opened(connection)
        if saved.area is not None:
            self._give_area(connection, held.take(saved.area))
        for shm in saved.shm:
            self._resume_shm(connection, shm, held)
        try:
            _at_once(device.resume(connection, saved.state, [*connection.shm.values()]))
        except Exception as error:
            log.warning("%r cannot go on: %s", connection, error)
            self._counters.failures += 1
            self.end(connection, Ended.FAILED)

    def _resume_shm(self, connection: Connection, saved: SavedShm, held: Held) -> None:
        known = saved.handle in self.signals or saved.id in connection.shm
        with_signal = saved.signal_offset is not None
        if known or with_signal != (saved.handle is not None):
            raise InvalidError(f"{connection}: memory {saved.id} a second time")
        if saved.handle is not None and saved.handle >= self._next_signal:
            raise InvalidError(f"{connection}: signal {saved.handle} is not given yet")
        self._check_limits(with_signal)
        event = Event(EventId.SHMSIGNAL, saved.cookie, priority=saved.prio)
        doorbell = None
        if saved.doorbell is not None:
            doorbell = Doorbell.adopt(held.take(saved.doorbell))
        try:
            view = self._memory.view(saved.addr, saved.size)
            shm = SharedMemory(
                saved.id,
                view,
                self._memory,
                flags=saved.flags,
                signal_offset=saved.signal_offset,
                prio=saved.prio,
                cookie=saved.cookie,
                post=self._poster(connection, saved.id, event),
                doorbell=doorbell,
            )
        except BaseException:
            if doorbell is not None:
                doorbell.close()
            raise
        self._shm_count += 1
        if saved.handle is not None:
            self._signal_count += 1
            shm.handle = saved.handle
            self.signals[saved.handle] = Signal(shm, event, connection)
        connection.add(shm)
        shm.accept()

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        for handle, connection in self.connections.items():
            assert handle == connection.handle != 0
            assert connection.state is State.OPEN
            assert connection in connection.device.connections
        for connection in self._opening:
            assert connection.state in (State.OPENING, State.ABORTED)
            assert connection.handle == 0
        for connection in self._closing:
            assert connection.state is State.CLOSING
        holders = [*self.connections.values(), *self._closing]
        listed = [shm for holder in holders for shm in holder.shm.values()]
        pending = [shm for holder in holders for shm in holder.sharing.values()]
        assert len(listed) + len(pending) == self._shm_count
        assert all(not shm.accepted and shm.handle is None for shm in pending)
        with_signal = {shm.handle: shm for shm in listed if shm.signal is not None}
        assert with_signal == {at: path.shm for at, path in self.signals.items()}
        assert all(0 <= at < self._next_signal for at in self.signals)
        assert self.alive or not (self.connections or self._closing or self.signals)


def _at_once(resuming: Awaitable[None] | None) -> None:
    """Insist that a device goes on without waiting, before its guest does."""
    if resuming is not None:
        raise InvalidError("it would have to wait")


def _saved(shm: SharedMemory, kept: Kept) -> SavedShm:
    bell = shm.doorbell
    return SavedShm(
        shm.id,
        shm.view.addr,
        shm.view.size,
        shm.flags,
        shm.prio,
        shm.cookie,
        shm.signal_offset,
        shm.handle,
        None if bell is None else kept.keep(bell.fileno()),
    )


def _ending(shm: SavedShm) -> Event:
    """Make the SHMCLOSE of memory that nobody shares any more."""
    return Event(EventId.SHMCLOSE, shm.cookie, priority=shm.prio)


def _split(answer: CallResult, device: Device) -> tuple[int, bytes]:
    """Tell result and data apart; anything else is a bug of the device."""
    result, out = 0, b""
    if isinstance(answer, tuple):
        result, out = answer
    elif isinstance(answer, int):
        result = answer
    elif answer is not None:
        out = answer
    if not isinstance(result, int) or not isinstance(out, (bytes, bytearray)):
        raise TypeError(f"{device.name} answers {answer!r}")
    if not -(1 << 31) <= result < 1 << 31:
        raise OverflowError(f"{device.name} answers {result}, not a 32-bit result")
    return result, out


def _answer(answer: CallResult, device: Device, reply: Callable[[bytes], None]) -> int:
    """Give the result, and the guest its data."""
    result, out = _split(answer, device)
    if out:
        reply(out)
    return result
