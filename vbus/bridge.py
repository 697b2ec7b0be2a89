"""The bridge: the one PCI function through which a guest reaches its whole bus.

Registers in, effects out: a synchronous state machine which never awaits. What a
register write starts and cannot end at once is given back as a Pending.

    BAR0  memory, 64 bytes    0 call number (a read executes)  4 length  8 address
    BAR1  ports, 32 bytes     0 event queue  4 fast call  8 shm-signal; write only
    BAR2  memory, 4096 bytes  MSI-X table, pending bits at 0x800 (extension)

    reset --NEGOTIATE--> negotiated --QREG--> ready
      ^                      |                  |
      +----------------------+------------------+   NEGOTIATE (which starts anew),
         function reset, bus mastering off, client gone
"""

import logging
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from errno import EBUSY, EEXIST, EFAULT, EINVAL, ENOSPC
from typing import Any

from outcome import Outcome

from shm import Doorbell, Gauge, View
from vbus import abi
from vbus.abi import BridgeCall, EventId
from vbus.asking import Result, Waiting
from vbus.bus import Bus, Interface
from vbus.client import (
    BusClient,
    ClientCounters,
    random_handle,
)
from vbus.connection import Connection, Ended, State
from vbus.effects import BridgeEffects
from vbus.errors import InvalidError, NotFoundError, VbusError
from vbus.eventring import EventRing
from vbus.events import Event, EventQueues, EventStatistics
from vbus.hypercall import Hypercalls
from vbus.memory import GuestMemory
from vbus.pci.config_space import Bar, ConfigSpace, Identity, Msi, Msix
from vbus.pci.function import ConfiguredFunction, IoEventFd, Pending
from vbus.saved import (
    Held,
    Kept,
    SavedBridge,
    SavedEvent,
    SavedQueue,
    SavedSession,
)
from vbus.trace import NO_TRACE, Trace

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
CHANNEL_LIMIT = 8192
_U32 = struct.Struct("<I")
_RESULT = abi.RESULT


@dataclass(frozen=True, slots=True)
class BridgeStatistics:
    """Counters of one guest's bridge since it was made."""

    negotiations: int
    resets: int
    """Sessions that ended."""
    bridge_calls: int
    fast_calls: int
    refused_fast_calls: int
    """Fast calls through an unknown, busy or unmapped channel."""
    opens: int
    closes: int
    shares: int
    device_calls: int
    connection_failures: int
    doorbells: int
    """Doorbells that came by message, not by eventfd."""
    bad_doorbells: int
    interrupts: int
    connections: Gauge
    """Open now."""
    signals: Gauge
    """Shared with a signal now."""
    channels: Gauge
    queues: Gauge
    events: EventStatistics


class _Channel:
    """A fast-call channel: a descriptor in guest memory, and whether a call runs."""

    __slots__ = ("busy", "view")

    def __init__(self, view: View) -> None:
        self.view = view
        self.busy = False


class _Session:
    """All that NEGOTIATE makes and a reset ends."""

    def __init__(self, client: BusClient, hypercalls: Hypercalls, caps: int) -> None:
        self.client = client
        self.hypercalls = hypercalls
        self.capabilities = caps
        self.channels: dict[int, _Channel] = {}
        self.rings: list[EventRing] = []


def config_space(*, msix: bool) -> ConfigSpace:
    """Build the bridge's configuration space; the same for any number of devices."""
    bars = {
        abi.BAR_CALLS: Bar(abi.BAR_CALLS_SIZE),
        abi.BAR_SIGNALS: Bar(abi.BAR_SIGNALS_SIZE, io=True),
    }
    capabilities: list[Msi | Msix] = [Msi()]
    if msix:
        bars[abi.BAR_MSIX] = Bar(abi.BAR_MSIX_SIZE)
        capabilities.append(Msix(abi.QUEUE_LIMIT, abi.BAR_MSIX, abi.MSIX_PBA_OFFSET))
    identity = Identity(
        abi.VENDOR_ID,
        abi.DEVICE_ID,
        abi.CLASS_CODE,
        abi.REVISION,
        abi.SUBSYSTEM_VENDOR_ID,
        abi.SUBSYSTEM_ID,
    )
    return ConfigSpace(identity, bars, capabilities, interrupt_pin=abi.INTERRUPT_PIN)


class Bridge(ConfiguredFunction):
    """The bridge function of one guest."""

    memory: GuestMemory

    def __init__(
        self,
        bus: Bus,
        effects: BridgeEffects,
        *,
        name: str,
        msix: bool = True,
        call_timeout_s: float = CALL_TIMEOUT_S,
        new_handle: Callable[[], int] = random_handle,
        trace: Trace = NO_TRACE,
    ) -> None:
        """Make the bridge of guest `name` onto `bus`.

        `call_timeout_s` bounds each call of a device; `new_handle` gives candidates
        for DEVOPEN's handles.
        """
        super().__init__(config_space(msix=msix), GuestMemory())
        self.name = name
        self.bus = bus
        self.events = EventQueues(self._queue_faulted)
        self._effects = effects
        self._timeout_s = call_timeout_s
        self._new_handle = new_handle
        self._trace = trace
        self._session: _Session | None = None
        self._shadow = bytearray(abi.BAR_CALLS_SIZE)
        self._counters = ClientCounters()
        self._negotiations = self._resets = self._raised = 0
        self._bridge_calls = self._fast_calls = self._refused_fast_calls = 0
        bus.subscribe(self)

    # The function

    def close(self) -> None:
        """The guest is removed: end everything."""
        self.detach()
        self.bus.unsubscribe(self)
        self.memory.close()

    def detach(self) -> None:
        self._end_session()
        super().detach()

    def reset(self) -> None:
        self._end_session()
        self._shadow[:] = bytes(len(self._shadow))
        super().reset()

    def bus_master_changed(self, enabled: bool) -> None:
        # The guest frees its event ring right after, without another word (ABI 12.2).
        if not enabled:
            self._end_session()

    def bar_read(self, bar: int, offset: int, size: int) -> bytes | Pending:
        if bar != abi.BAR_CALLS or size != 4:
            return bytes(size)  # nothing else is readable, and reading does nothing
        self._bridge_calls += 1
        vector, length, gpa = abi.CALL.unpack(self._shadow[: abi.CALL.size])
        result = self._bridge_call(vector, length, gpa)
        if isinstance(result, Waiting):
            finish = result.finish
            return Pending(
                result.work,
                lambda answer: _RESULT.pack(finish(answer)),
                self._timeout_s,
            )
        return _RESULT.pack(result)

    def bar_write(self, bar: int, offset: int, data: bytes) -> Pending | None:
        if bar == abi.BAR_CALLS:
            # 12.2: an aligned 8-byte write is two of 4 bytes; narrower ones are ignored
            if len(data) == 4 or (len(data) == 8 and offset % 8 == 0):
                self._shadow[offset : offset + len(data)] = data
        elif len(data) == 4 and self.bus_master and self._session is not None:
            (value,) = _U32.unpack(data)
            if offset == abi.SIGNAL_FASTCALL:
                return self._fast_call(self._session, value)
            if offset == abi.SIGNAL_SHM:
                self._session.client.ring(value)
            elif offset == abi.SIGNAL_EVENTQ:
                self.events.room(value)
        return None

    def io_eventfds(self, region: int, limit: int) -> list[IoEventFd]:
        if region != abi.BAR_SIGNALS or self._session is None:
            return []
        found: list[IoEventFd] = []
        for handle, signal in reversed(self._session.client.signals.items()):
            if len(found) >= limit:
                return found
            if (doorbell := signal.shm.doorbell) is not None:
                found.append(IoEventFd(abi.SIGNAL_SHM, 4, doorbell.fileno(), handle))
        for index, ring in reversed(list(enumerate(self._session.rings))):
            found.append(IoEventFd(abi.SIGNAL_EVENTQ, 4, ring.doorbell.fileno(), index))
        return found[:limit]

    def fence(self) -> Callable[[], Awaitable[object]] | None:
        return self.memory.fence()

    # Being replaced

    @property
    def busy(self) -> bool:
        return self._session is not None and self._session.client.busy

    def save(self, kept: Kept) -> SavedBridge:
        session = None if self._session is None else self._save(self._session, kept)
        return SavedBridge(
            self.memory.save(kept),
            self.config.save(),
            b"" if self.msix is None else self.msix.save(),
            bytes(self._shadow),
            session,
        )

    def _save(self, session: _Session, kept: Kept) -> SavedSession:
        connections = session.client.save(kept)
        signals = {
            id(signal.event): handle
            for handle, signal in session.client.signals.items()
        }
        return SavedSession(
            session.capabilities,
            session.client.next_signal,
            {at: one.view.addr for at, one in session.channels.items()},
            tuple(
                SavedQueue(*ring.entry, kept.keep(ring.doorbell.fileno()))
                for ring in session.rings
            ),
            connections,
            tuple(
                SavedEvent(event.record, event.priority, signals.get(id(event)))
                for event in self.events.backlog()
            ),
        )

    def resume(self, saved: SavedBridge, held: Held) -> None:
        self.memory.resume(saved.memory, held)
        self.config.resume(saved.config)
        if self.msix is not None:
            self.msix.resume(saved.msix)
        size = len(self._shadow)
        self._shadow[:] = saved.calls[:size].ljust(size, b"\0")
        if saved.session is not None:
            if not self.bus_master:
                raise InvalidError("a session without bus mastering")
            self._session = self._new_session(saved.session.capabilities)
            self._resume(self._session, saved.session, held)

    def _resume(self, session: _Session, saved: SavedSession, held: Held) -> None:
        lost = session.client.resume(
            saved.connections, saved.next_signal, self._find, held
        )
        for at, gpa in saved.channels.items():
            self._add_channel(session, at, abi.FASTCALL.size, gpa)
        for one in saved.events:
            signal = session.client.signals.get(
                -1 if one.signal is None else one.signal
            )
            event = Event.of(one.record, one.priority)
            self.events.post(event if signal is None else signal.event)
        self.events.post(*lost)
        if saved.queues:
            session.rings = self._resumed_rings(saved.queues, held)
            self._flow(session)

    def _resumed_rings(
        self, saved: Sequence[SavedQueue], held: Held
    ) -> list[EventRing]:
        rings: list[EventRing] = []
        try:
            for index, queue in enumerate(saved[: abi.QUEUE_LIMIT]):
                doorbell = Doorbell.adopt(held.take(queue.doorbell))
                entry = abi.QueueEntry(queue.descriptors, queue.ring, queue.data)
                interrupt = self._interrupter(index)
                rings.append(EventRing(entry, self.memory, interrupt, doorbell))
        except BaseException:
            for ring in rings:
                ring.close()
            raise
        return rings

    def missing(self, known: Iterable[int]) -> None:
        """Drop the devices that the guest knows from before and that are not there."""
        gone = [id for id in known if id not in self.bus.interfaces]
        if self.events.opened:
            self.events.post(*(Event(EventId.DEVDROP, id) for id in gone))

    def _find(self, name: str) -> Interface | None:
        try:
            return self.bus.find(name)
        except NotFoundError:
            return None

    # What comes from the device's side

    def connection_failed(self, connection: Connection, error: BaseException) -> None:
        """The task of a connection ended with `error`: end the connection alone."""
        is_open = connection.state is State.OPEN
        if isinstance(error, VbusError):
            if not is_open:
                return  # it only noticed the end
            log.warning("%r failed: %s", connection, error)
        else:
            log.error("%r failed", connection, exc_info=error)
        self._counters.failures += 1
        if is_open and self._session is not None:
            self._session.client.end(connection, Ended.FAILED)

    def added(self, interface: Interface) -> None:
        """A device came to the bus."""
        session = self._session
        if session is not None and self.events.opened:
            self.events.post(*self._announcement(session, interface))

    def dropped(self, interface: Interface) -> None:
        """A device left the bus: its connections end before the guest hears of it."""
        session = self._session
        if session is None:
            return
        session.client.drop(interface)
        if self.events.opened:
            self.events.post(Event(EventId.DEVDROP, interface.id))

    def statistics(self) -> BridgeStatistics:
        session = self._session
        counters = self._counters
        return BridgeStatistics(
            negotiations=self._negotiations,
            resets=self._resets,
            bridge_calls=self._bridge_calls,
            fast_calls=self._fast_calls,
            refused_fast_calls=self._refused_fast_calls,
            opens=counters.opens,
            closes=counters.closes,
            shares=counters.shares,
            device_calls=counters.calls,
            connection_failures=counters.failures,
            doorbells=counters.doorbells,
            bad_doorbells=counters.bad_doorbells,
            interrupts=self._raised,
            connections=len(session.client.connections) if session else 0,
            signals=len(session.client.signals) if session else 0,
            channels=len(session.channels) if session else 0,
            queues=len(session.rings) if session else 0,
            events=self.events.statistics(),
        )

    @property
    def connections(self) -> list[Connection]:
        """The guest's open connections."""
        session = self._session
        return list(session.client.connections.values()) if session else []

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds; for tests."""
        self.events.validate()
        session = self._session
        if session is None:
            assert not self.events.opened
            assert self.events.waiting == 0
            return
        assert self.bus_master
        assert session.client.alive
        assert bool(session.rings) == self.events.opened
        assert len(session.channels) <= CHANNEL_LIMIT
        session.client.validate()
        for connection in session.client.connections.values():
            interface = self.bus.find(connection.device.name)
            assert interface.device is connection.device

    # Bridge calls

    def _bridge_call(self, vector: int, length: int, gpa: int) -> Result:
        if not self.bus_master:
            return -EFAULT
        try:
            if vector == BridgeCall.NEGOTIATE:
                return self._negotiate(length, gpa)
            if self._session is None:
                return -EINVAL
            if vector == BridgeCall.QREG:
                return self._register_queues(self._session, length, gpa)
            if vector in (BridgeCall.SLOWCALL, BridgeCall.FASTCALL_ADD):
                if length != abi.CALL.size:
                    return -EINVAL
                call = abi.CALL.unpack(self.memory.read(gpa, length))
                if vector == BridgeCall.SLOWCALL:
                    return self._session.hypercalls.run(*call)
                return self._add_channel(self._session, *call)
        except VbusError as error:
            return -error.errno
        return -EINVAL

    def _negotiate(self, length: int, gpa: int) -> int:
        """ABI 2.3: a wrong magic does nothing, a wrong version still resets."""
        if length != abi.NEGOTIATE.size:
            return -EINVAL
        offer = abi.NEGOTIATE.unpack(self.memory.read(gpa, length))
        if offer.magic != abi.NEGOTIATE_MAGIC:
            return -EINVAL
        self._end_session()
        agreed = offer.version == abi.HYPERCALL_VERSION
        capabilities = offer.capabilities & abi.CAPABILITIES if agreed else 0
        self.memory.write(
            gpa, abi.NEGOTIATE.pack(offer._replace(capabilities=capabilities))
        )
        if not agreed:
            return -EINVAL
        self._negotiations += 1
        self._session = self._new_session(capabilities)
        return abi.HYPERCALL_VERSION

    def _new_session(self, capabilities: int) -> _Session:
        client = BusClient(
            self.name,
            self.memory,
            self.events,
            self._effects,
            self._counters,
            timeout_s=self._timeout_s,
            new_handle=self._new_handle,
            trace=self._trace,
        )
        hypercalls = Hypercalls(client, self.bus, self.memory, capabilities)
        return _Session(client, hypercalls, capabilities)

    def _end_session(self) -> None:
        """Forget all that is the guest's, and touch its memory no more."""
        session, self._session = self._session, None
        if session is None:
            return
        self._resets += 1
        session.client.shutdown()
        self.events.reset()
        for ring in session.rings:
            self._effects.unwatch(ring.doorbell)
            ring.close()
        for channel in session.channels.values():
            channel.view.close()

    def _register_queues(self, session: _Session, length: int, gpa: int) -> int:
        limit = abi.QUEUE_LIMIT if session.capabilities & abi.CAP_MULTIQUEUE else 1
        if session.rings or not abi.qreg_size(1) <= length <= abi.qreg_size(limit):
            return -EINVAL
        argument = self.memory.read(gpa, length)
        (count,) = abi.QREG_HEAD.unpack_from(argument)
        if length != abi.qreg_size(count):
            return -EINVAL
        for index, entry in enumerate(abi.unpack_qreg(argument)):
            try:
                ring = EventRing(entry, self.memory, self._interrupter(index))
            except (VbusError, OSError) as error:
                for done in session.rings:
                    done.close()
                session.rings.clear()
                return -error.errno if isinstance(error, VbusError) else -ENOSPC
            session.rings.append(ring)
        self._open_queues(session)
        return 0

    def _open_queues(self, session: _Session) -> None:
        """Start delivery: every device on the bus first, then live events."""
        present = [
            event
            for interface in self.bus.interfaces.values()
            for event in self._announcement(session, interface)
        ]
        self.events.post(*present)
        self._flow(session)

    def _flow(self, session: _Session) -> None:
        for index, ring in enumerate(session.rings):
            self._effects.watch(ring.doorbell, self._room_maker(index))
        self.events.open(session.rings)

    def _announcement(self, session: _Session, interface: Interface) -> list[Event]:
        """DEVADD, and the name just before it for a guest that asked for names."""
        add = Event(EventId.DEVADD, interface.id, interface.type.encode())
        if not session.capabilities & abi.CAP_NAMES:
            return [add]
        return [Event(EventId.DEVNAME, interface.id, interface.name.encode()), add]

    def _interrupter(self, vector: int) -> Callable[[], object]:
        def raise_interrupt() -> None:
            self._raised += self.interrupt(vector)

        return raise_interrupt

    def _room_maker(self, index: int) -> Callable[[], object]:
        return lambda: self.events.room(index)

    def _queue_faulted(self, index: int, reason: str) -> None:
        log.warning("guest %s: event queue %d: %s", self.name, index, reason)

    # Fast calls

    def _add_channel(self, session: _Session, id: int, length: int, gpa: int) -> int:
        if length != abi.FASTCALL.size:
            return -EINVAL
        if id in session.channels:
            return -EEXIST
        if len(session.channels) >= CHANNEL_LIMIT:
            return -ENOSPC
        session.channels[id] = _Channel(self.memory.view(gpa, length))
        return 0

    def _fast_call(self, session: _Session, id: int) -> Pending | None:
        """Run the call in channel `id`; other channels are not concerned (R9)."""
        channel = session.channels.get(id)
        if channel is None:
            self._refused_fast_calls += 1
            return None
        try:
            if channel.busy:
                # The guest broke its own lock; the first call goes on undisturbed.
                self._refused_fast_calls += 1
                self._store(channel, -EBUSY)
                return None
            call = abi.CALL.unpack(channel.view.read(0, abi.CALL.size))
            self._fast_calls += 1
            result = session.hypercalls.run(*call)
            if not isinstance(result, Waiting):
                self._store(channel, result)
                return None
        except VbusError:
            self._refused_fast_calls += 1
            return None
        channel.busy = True
        return self._pending_fast_call(session, channel, result)

    def _pending_fast_call(
        self, session: _Session, channel: _Channel, waiting: Waiting
    ) -> Pending:
        def complete(answer: Outcome[Any]) -> None:
            channel.busy = False
            result = waiting.finish(answer)
            if self._session is session:
                try:
                    self._store(channel, result)
                except VbusError:
                    self._refused_fast_calls += 1

        return Pending(waiting.work, complete, self._timeout_s)

    @staticmethod
    def _store(channel: _Channel, result: int) -> None:
        channel.view.write(abi.RESULT_OFFSET, _RESULT.pack(result))


__all__ = ["Bridge", "BridgeStatistics", "config_space"]
