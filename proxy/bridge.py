"""The bridge driver: from one PCI function to all the devices behind it (ABI 1-4).

    discover -> NEGOTIATE -> event queues laid -> interrupts -> channels -> QREG
      -> events, highest priority first, until the function is gone

Platform-independent: it knows the function by `PciFunction` only.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

import trio

from proxy.calls import Calls, CallStatistics, check
from proxy.device import DeviceProxy, SharedMemory, open_device
from proxy.errors import again
from proxy.eventqueue import EventQueue
from proxy.pci import Interrupts, InterruptStatistics, PciFunction
from vbus import abi
from vbus.abi import CAP_MULTIQUEUE, CAP_NAMES, BridgeCall, Event, EventId
from vbus.errors import (
    BusyError,
    NoDeviceError,
    NotFoundError,
    ProtocolError,
    VbusError,
)
from vbus.pci.constants import Command, Irq, Offset

log = logging.getLogger(__name__)

SINGLE_QUEUE_SIZE = 1024
MULTI_QUEUE_SIZE = 256
NO_INTERRUPTS = InterruptStatistics(())
_BATCH = 32
_TURN_NS = 50_000
_COMMAND_BITS = Command.MEMORY | Command.IO | Command.BUS_MASTER
_CHECKED = {
    Offset.VENDOR_ID: abi.VENDOR_ID,
    Offset.DEVICE_ID: abi.DEVICE_ID,
}


class Observer(Protocol):
    """Who is told about devices that come and go."""

    def added(self, device: DeviceProxy) -> None: ...
    def dropped(self, device: DeviceProxy) -> None: ...


@dataclass(frozen=True)
class BridgeStatistics:
    """Counters of an attached bridge."""

    queues: int
    capabilities: int
    interrupts: InterruptStatistics
    events: dict[str, int]
    """Events taken, by kind in lower case; "unknown" are those of a later ABI."""
    batches: int
    doorbells: int
    """Times the host was told that an event queue has room."""
    devices: int
    calls: CallStatistics


class _Arrival:
    """Somebody waits for a device that is not there yet."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.device: DeviceProxy | None = None


class BridgeDriver:
    """Drives the bridge behind `function`; `compat` keeps to the original protocol."""

    def __init__(self, function: PciFunction, *, compat: bool = False) -> None:
        self.function = function
        self.calls = Calls(function)
        self.capabilities = 0
        self.devices: dict[int, DeviceProxy] = {}
        self._offer = 0 if compat else CAP_MULTIQUEUE | CAP_NAMES
        self._queues: list[EventQueue] = []
        self._interrupts: Interrupts | None = None
        self._one_vector = True
        self._names: dict[int, str] = {}
        self._signals: dict[int, tuple[DeviceProxy, SharedMemory]] = {}
        self._next_cookie = 1
        self._arrivals: dict[int | str, _Arrival] = {}
        self._observers: list[Observer] = []
        self._error: VbusError | None = None
        self._events = dict.fromkeys([kind.name.lower() for kind in EventId], 0)
        self._events["unknown"] = 0
        self._batches = self._doorbells = 0
        self._handlers = {
            EventId.DEVNAME: self._name,
            EventId.DEVADD: self._add,
            EventId.DEVDROP: self._drop,
            EventId.SHMSIGNAL: self._signal,
            EventId.SHMCLOSE: self._close_signal,
        }

    # Attach and leave

    async def attach(self) -> None:
        """Find the bridge, agree with it and open its event queues.

        Raises NotFoundError if the function is no bridge of ours, and what the host
        refuses with.
        """
        await self._discover()
        await self.function.set_command(_COMMAND_BITS, on=True)
        await self._negotiate()
        kind, count = self._plan_queues()
        size = SINGLE_QUEUE_SIZE if count == 1 else MULTI_QUEUE_SIZE
        for index in range(count):
            queue = EventQueue(
                self.function.memory, size, partial(self.tell_room, index)
            )
            self._queues.append(queue)
        self._one_vector = kind is not Irq.MSIX
        vectors = 1 if self._one_vector else count
        self._interrupts = await self.function.enable_interrupts(kind, vectors)
        self._interrupts.watch(self._waiting)
        await self.calls.add_channels()
        argument = abi.pack_qreg([queue.entry for queue in self._queues])
        result, _ = await self.calls.bridge_call(BridgeCall.QREG, argument)
        check(result, "QREG")
        for index in range(count):
            self.function.add_doorbell(abi.BAR_SIGNALS, abi.SIGNAL_EVENTQ, index)

    async def _discover(self) -> None:
        for offset, expected in _CHECKED.items():
            found = await self.function.config_read_u16(offset)
            if found != expected:
                raise NotFoundError(
                    f"the function is no bridge: {offset.name.lower()} {found:#06x}"
                )
        revision = (await self.function.config_read(Offset.REVISION, 1))[0]
        if revision != abi.REVISION:
            raise NotFoundError(
                f"the bridge has revision {revision}, this driver knows {abi.REVISION}"
            )

    async def _negotiate(self) -> None:
        offer = abi.Negotiate(abi.NEGOTIATE_MAGIC, abi.HYPERCALL_VERSION, self._offer)
        result, answer = await self.calls.bridge_call(
            BridgeCall.NEGOTIATE, abi.NEGOTIATE.pack(offer)
        )
        check(result, "NEGOTIATE")
        self.capabilities = abi.NEGOTIATE.unpack(answer).capabilities & self._offer

    def _plan_queues(self) -> tuple[Irq, int]:
        """Choose the kind of interrupt and the number of event queues."""
        multi = bool(self.capabilities & CAP_MULTIQUEUE)
        vectors = self.function.interrupt_vectors(Irq.MSIX)
        if multi and vectors >= abi.QUEUE_LIMIT:
            return Irq.MSIX, abi.QUEUE_LIMIT
        kind = Irq.MSI if self.function.interrupt_vectors(Irq.MSI) else Irq.INTX
        return kind, abi.QUEUE_LIMIT if multi else 1

    def tell_room(self, index: int) -> None:
        """Tell the host that event queue `index` has room again."""
        self._doorbells += 1
        self.function.ring_doorbell(abi.BAR_SIGNALS, abi.SIGNAL_EVENTQ, index)

    async def detach(self) -> None:
        """Close what is open, then have the host let go of our memory.

        Devices end with NoDeviceError. The host being gone is no error.
        """
        try:
            for device in tuple(self.devices.values()):
                await device.close()
            await self.function.set_command(Command.BUS_MASTER, on=False)
        except VbusError as error:
            log.info("while leaving: %s", error)
        self.lose(NoDeviceError("the guest has left the bridge"))
        for queue in self._queues:
            queue.close()
        self.calls.close()

    def lose(self, error: VbusError) -> None:
        """The function is gone: everything that waits on a device gets `error`."""
        if self._error is not None:
            return
        self._error = error
        for device in tuple(self.devices.values()):
            self._remove(device, error)
        for arrival in self._arrivals.values():
            arrival.event.set()
        self._arrivals.clear()

    # Devices

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tell `observer` of every device: those that are here, then what changes."""
        self._observers.append(observer)
        try:
            for device in tuple(self.devices.values()):
                observer.added(device)
            yield
        finally:
            self._observers.remove(observer)

    async def device(self, key: int | str) -> DeviceProxy:
        """Wait until a device is here: by name or, as a number, by id.

        Raises NoDeviceError once the bridge is gone.
        """
        for device in self.devices.values():
            if key in (device.id, device.name):
                return device
        if self._error is not None:
            raise again(self._error)
        arrival = self._arrivals.setdefault(key, _Arrival())
        await arrival.event.wait()
        if arrival.device is None:
            raise again(self._error or NoDeviceError("the bridge is gone"))
        return arrival.device

    async def open(self, name: str, version: int = 1) -> DeviceProxy:
        """Open a device by its name, which the host looks up.

        Needs a host that gives names. Raises what the host refuses with.
        """
        if any(each.name == name and each.is_open for each in self.devices.values()):
            raise BusyError(f"{name} is open")
        with trio.CancelScope(shield=True):
            opened = await open_device(self.calls, None, name, version)
            # Its DEVADD may still be in the queue.
            device = await self.device(opened.devid)
        device.adopt(opened.handle)
        return device

    # For device proxies

    def add_signal(self, device: DeviceProxy, shm: SharedMemory) -> int:
        """Give a new cookie, whose signals ring `shm.wake`."""
        cookie = self._next_cookie
        self._next_cookie += 1
        self._signals[cookie] = device, shm
        return cookie

    def remove_signal(self, cookie: int) -> None:
        """Ignore further signals of that cookie."""
        self._signals.pop(cookie, None)

    # Events

    async def run(self) -> NoReturn:
        """Handle events until cancelled; raises NoDeviceError when the host goes.

        Any error takes all devices with it.
        """
        assert self._interrupts is not None, "attach() comes first"
        try:
            while True:
                await self._handle(await self._interrupts.wait())
        except VbusError as error:
            self.lose(error)
            raise

    async def _handle(self, vectors: Sequence[int]) -> None:
        """Empty the queues that were signalled, the most urgent first.

        After each batch the more urgent queues are looked at again, whether or not
        their interrupt has been seen.
        """
        awake = set(range(len(self._queues)) if self._one_vector else vectors)
        turn_ends = time.perf_counter_ns() + _TURN_NS
        while awake:
            index = max(awake)
            if self._run_batch(self._queues[index]):
                awake.discard(index)
            for higher in range(index + 1, len(self._queues)):
                if self._queues[higher].waiting():
                    awake.add(higher)
            if time.perf_counter_ns() > turn_ends:
                await trio.lowlevel.checkpoint()
                turn_ends = time.perf_counter_ns() + _TURN_NS

    def _waiting(self) -> bool:
        """Is there an event in any queue? Raises RingFault."""
        return any(queue.waiting() for queue in self._queues)

    def _run_batch(self, queue: EventQueue) -> bool:
        """Handle one batch; True if the queue is done until its next interrupt."""
        self._batches += 1
        queue.begin()
        events = queue.take(_BATCH)
        for event in events:
            self._dispatch(event)
        return len(events) < _BATCH and not queue.end()

    def _dispatch(self, event: Event) -> None:
        try:
            kind = EventId(event.eventid)
        except ValueError:
            self._events["unknown"] += 1
            log.warning("event of unknown kind %d", event.eventid)
            return
        self._events[kind.name.lower()] += 1
        self._handlers[kind](event)

    def _name(self, event: Event) -> None:
        self._names[event.handle] = abi.text_of(event.text)

    def _add(self, event: Event) -> None:
        id = event.handle
        name = self._names.pop(id, f"dev{id}")
        if id in self.devices:
            raise ProtocolError(f"the host added device {id} twice")
        device = DeviceProxy(self, id, abi.text_of(event.text), name)
        self.devices[id] = device
        for key in (id, name):
            arrival = self._arrivals.pop(key, None)
            if arrival is not None:
                arrival.device = device
                arrival.event.set()
        for observer in tuple(self._observers):
            observer.added(device)

    def _drop(self, event: Event) -> None:
        device = self.devices.get(event.handle)
        if device is None:
            log.warning("the host dropped device %d, which is not here", event.handle)
            return
        self._remove(device, NoDeviceError(f"{device.name} has left the bus"))

    def _remove(self, device: DeviceProxy, error: VbusError) -> None:
        del self.devices[device.id]
        device.lose(error)
        for observer in tuple(self._observers):
            observer.dropped(device)

    def _signal(self, event: Event) -> None:
        found = self._signals.get(event.handle)
        if found is not None:
            found[1].wake.ring()

    def _close_signal(self, event: Event) -> None:
        """The last use of a cookie; if we did not close it, the host ended it all."""
        found = self._signals.get(event.handle)
        if found is not None:
            device, _ = found
            device.disconnect(NoDeviceError(f"the host has closed {device.name}"))

    def statistics(self) -> BridgeStatistics:
        """A snapshot of the counters."""
        interrupts = self._interrupts
        return BridgeStatistics(
            queues=len(self._queues),
            capabilities=self.capabilities,
            interrupts=interrupts.statistics() if interrupts else NO_INTERRUPTS,
            events=dict(self._events),
            batches=self._batches,
            doorbells=self._doorbells,
            devices=len(self.devices),
            calls=self.calls.statistics(),
        )
