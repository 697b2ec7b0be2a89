"""Device proxies: what a driver in the guest holds of a device on the bus.

    device = await bridge.device("echo0")
    async with device.opened():
        result, data = await device.call(0, b"hello")

Calls, shared memory and rings belong to one connection, from `open` to `close`. When
the device leaves the bus, or the host ends the connection or goes itself, whoever waits
gets the error, and only `close` is left to do.
"""

from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from ioq import AdaptiveSpin, Index, Ring, RingConsumer, RingProducer, ring_size
from proxy.calls import Calls, check
from proxy.errors import again
from proxy.memory import DmaBuffer
from proxy.pci import Abort, PciFunction
from shm import AddressSpace, Locality, ShmSignal
from vbus import abi
from vbus.abi import BAR_SIGNALS, SIGNAL_SHM, Hypercall
from vbus.errors import (
    BusyError,
    InvalidError,
    NoDeviceError,
    NotFoundError,
    VbusError,
)

RING_SIGNAL_OFFSET = 8


class Wake:
    """A doorbell inside the process: remembers being rung, or that it never will."""

    def __init__(self) -> None:
        self._rung = False
        self._error: VbusError | None = None
        self._waiting = trio.lowlevel.ParkingLot()

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        self._rung = True
        self._waiting.unpark_all()

    def fail(self, error: VbusError) -> None:
        """From now on waiting raises `error`."""
        self._error = error
        self._waiting.unpark_all()

    async def wait(self) -> None:
        """Return once rung since the last return; raise the error of `fail`.

        A checkpoint. Cancelled, it has taken nothing.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._rung:
            await trio.lowlevel.cancel_shielded_checkpoint()
        while not self._rung:
            if self._error is not None:
                raise again(self._error)
            await self._waiting.park()
        self._rung = False


class SharedMemory:
    """Memory shared with a device; `signal`, if it has one, goes both ways."""

    def __init__(self, id: int, buffer: DmaBuffer, wake: Wake | None) -> None:
        self.id = id
        self.buffer = buffer
        self.wake = wake or Wake()
        self.signal: ShmSignal | None = None
        self.handle: int | None = None
        """What the host knows the signal by, once it does."""
        self.cookie = 0


class Host(Protocol):
    """What a proxy needs of the bridge driver."""

    function: PciFunction
    calls: Calls

    def add_signal(self, device: "DeviceProxy", shm: SharedMemory) -> int:
        """Have SHMSIGNAL of a new cookie ring `shm.wake`; give the cookie."""

    def remove_signal(self, cookie: int) -> None:
        """Forget it."""


@dataclass(frozen=True)
class DeviceStatistics:
    """Of the whole life of a proxy; `shared` are the memories shared now."""

    opens: int
    calls: int
    refused_calls: int
    shared: int


class NorthProducer(RingProducer):
    """Fills a ring from slots of guest memory, one for each descriptor."""

    def __init__(
        self, ring: Ring, wake: Wake, slots: tuple[int, int], spin: AdaptiveSpin | None
    ) -> None:
        super().__init__(ring, wake, spin)
        self._slots = slots

    async def send(
        self,
        payload: bytes | bytearray | memoryview,
        sizes: "int | array[int] | memoryview",
        *,
        slots: tuple[int, int] | None = None,
    ) -> None:
        """See RingProducer.send; raises the error once the device is gone."""
        await super().send(payload, sizes, slots=slots or self._slots)


class NorthConsumer(RingConsumer):
    """Drains a ring whose buffers are ours and posts them again, empty."""

    def __init__(
        self, ring: Ring, wake: Wake, slot_size: int, spin: AdaptiveSpin | None
    ) -> None:
        super().__init__(ring, wake, spin)
        self._slot_size = slot_size

    async def receive(
        self,
        payload: bytearray | memoryview,
        sizes: "array[int] | memoryview",
        *,
        repost: int | None = None,
    ) -> int:
        """See RingConsumer.receive; raises the error once the device is gone."""
        return await super().receive(payload, sizes, repost=repost or self._slot_size)


class DeviceProxy:
    """One device on the bus as the guest sees it."""

    def __init__(self, host: Host, id: int, type: str, name: str) -> None:
        self.id = id
        self.type = type
        self.name = name
        self.gone = trio.Event()
        """Set once the device has left the bus, or the host has gone."""
        self._host = host
        self._handle = 0
        self._opening = False
        self._gone: VbusError | None = None
        self._ended: VbusError | None = None
        self._shared: dict[int, SharedMemory] = {}
        self._buffers: list[DmaBuffer] = []
        self._under_way: set[Abort] = set()
        self._opens = self._calls = self._refused = 0

    def __repr__(self) -> str:
        return f"<DeviceProxy {self.id}: {self.name} ({self.type})>"

    @property
    def is_open(self) -> bool:
        return self._handle != 0

    # Open and close

    async def open(self, version: int = 1, *, by_name: bool = False) -> None:
        """Open a connection; `by_name` finds the device by its name in the host.

        Once under way it cannot be cancelled. Raises BusyError if it is open, and
        what the host refuses with.
        """
        if self._gone is not None:
            raise again(self._gone)
        if self._handle or self._opening:
            raise BusyError(f"{self.name} is open")
        self._opening = True
        try:
            with trio.CancelScope(shield=True):
                opened = await open_device(
                    self._host.calls, None if by_name else self.id, self.name, version
                )
        finally:
            self._opening = False
        self.adopt(opened.handle)

    def adopt(self, handle: int) -> None:
        """Take over a connection that is open already."""
        self._handle = handle
        self._ended = self._gone
        self._opens += 1

    async def close(self) -> None:
        """Close the connection and free what belongs to it. Idempotent.

        Once under way it cannot be cancelled; raises nothing if the device is gone.
        """
        handle, self._handle = self._handle, 0
        if not handle:
            return
        try:
            if self._ended is None:
                with trio.CancelScope(shield=True):
                    await self._close(handle)
        finally:
            self._release()

    async def _close(self, handle: int) -> None:
        argument = abi.DEVCLOSE.pack(abi.DeviceClose(handle))
        try:
            answer = await self._host.calls.hypercall(
                Hypercall.DEVCLOSE, lambda _: argument
            )
            check(answer.result, f"DEVCLOSE of {self.name}")
        except (NotFoundError, NoDeviceError):
            pass  # the connection or the host went while we asked

    @asynccontextmanager
    async def opened(self, version: int = 1) -> AsyncIterator["DeviceProxy"]:
        """Open for the time of the body."""
        await self.open(version)
        try:
            yield self
        finally:
            await self.close()

    # Calls

    async def call(
        self,
        func: int,
        data: bytes = b"",
        out_size: int | None = None,
        *,
        flags: int = 0,
    ) -> tuple[int, bytes]:
        """Call a function of the device; give its result and the data as it left it.

        The buffer is as long as the longer of `data` and `out_size`; `out_size` bytes
        of it (by default all) come back. A negative result raises the VbusError of its
        errno. Cancelled, the call goes on in the host.
        """
        handle = self._connected()
        size = max(len(data), out_size or 0)
        abort = Abort()
        self._under_way.add(abort)
        self._calls += 1
        try:
            answer = await self._host.calls.hypercall(
                Hypercall.DEVCALL,
                lambda datap: abi.DEVCALL.pack(
                    abi.DeviceCall(handle, func, size, flags, datap)
                ),
                data,
                size,
                abort,
            )
        finally:
            self._under_way.discard(abort)
        if answer.result < 0:
            self._refused += 1
        result = check(answer.result, f"{self.name}: function {func}")
        return result, answer.data if out_size is None else answer.data[:out_size]

    # Shared memory

    @property
    def space(self) -> AddressSpace:
        """Our memory, by the addresses that the device knows."""
        return self._host.function.memory.space

    def allocate(self, size: int, *, alignment: int = 64) -> DmaBuffer:
        """Allocate guest memory that is freed when the connection is closed."""
        self._connected()
        buffer = self._host.function.memory.allocate(size, alignment=alignment)
        self._buffers.append(buffer)
        return buffer

    async def shm(
        self,
        id: int,
        buffer: DmaBuffer,
        *,
        signal_offset: int | None = None,
        prio: int = 0,
        flags: int = 0,
        wake: Wake | None = None,
    ) -> SharedMemory:
        """Share `buffer` under `id`, with a signal at `signal_offset` or none.

        The signal must be formatted there (a ring has one at 8). The device's
        notifications ring `wake`. Once under way it cannot be cancelled. Raises what
        the host refuses with; the memory stays shared until `close`.
        """
        shm = SharedMemory(id, buffer, wake)
        if signal_offset is not None:
            shm.signal = ShmSignal(
                buffer.view, signal_offset, Locality.NORTH, self.notifier(shm)
            )
        return await self._share(shm, signal_offset, prio, flags)

    async def ring(
        self, id: int, count: int, *, prio: int = 0, wake: Wake | None = None
    ) -> tuple[Ring, SharedMemory]:
        """Make a ring of `count` descriptors and share it."""
        ring, shm = self.new_ring(id, count, wake)
        await self.share_ring(shm, prio=prio)
        return ring, shm

    async def producer(
        self,
        id: int,
        count: int,
        *,
        slot_size: int,
        prio: int = 0,
        spin: AdaptiveSpin | None = None,
    ) -> NorthProducer:
        """Share a ring that we fill, with messages of up to `slot_size` bytes."""
        slots = self.allocate(count * slot_size)
        ring, shm = await self.ring(id, count, prio=prio)
        return NorthProducer(ring, shm.wake, (slots.addr, slot_size), spin)

    async def consumer(
        self,
        id: int,
        count: int,
        *,
        slot_size: int,
        prio: int = 0,
        spin: AdaptiveSpin | None = None,
    ) -> NorthConsumer:
        """Share a ring that the device fills, with all its buffers posted."""
        slots = self.allocate(count * slot_size)
        ring, shm = self.new_ring(id, count)
        buffers = [(n, slots.addr + n * slot_size, slot_size) for n in range(count)]
        ring.push(buffers, Index.VALID)
        await self.share_ring(shm, prio=prio)
        return NorthConsumer(ring, shm.wake, slot_size, spin)

    def new_ring(
        self, id: int, count: int, wake: Wake | None = None
    ) -> tuple[Ring, SharedMemory]:
        """Lay a ring that `share_ring` shares later, after it was filled."""
        buffer = self.allocate(ring_size(count), alignment=4096)
        Ring.format(buffer.view, count)
        shm = SharedMemory(id, buffer, wake)
        ring = Ring(buffer.view, self.space, Locality.NORTH, self.notifier(shm))
        shm.signal = ring.signal
        return ring, shm

    async def share_ring(self, shm: SharedMemory, *, prio: int = 0) -> SharedMemory:
        """Share what `new_ring` made."""
        return await self._share(shm, RING_SIGNAL_OFFSET, prio, 0)

    def notifier(self, shm: SharedMemory) -> Callable[[], None]:
        """What rings the device for `shm`; before it is shared it does nothing."""

        def notify() -> None:
            if shm.handle is not None:
                self._host.function.ring_doorbell(BAR_SIGNALS, SIGNAL_SHM, shm.handle)

        return notify

    async def _share(
        self, shm: SharedMemory, signal_offset: int | None, prio: int, flags: int
    ) -> SharedMemory:
        handle = self._connected()
        if shm.id in self._shared:
            raise InvalidError(f"{self.name}: memory {shm.id} is shared already")
        if signal_offset is not None:
            shm.cookie = self._host.add_signal(self, shm)
        call = abi.DeviceShm(
            handle,
            shm.id,
            shm.buffer.size,
            flags,
            abi.NO_SIGNAL if signal_offset is None else signal_offset,
            prio,
            shm.cookie,
            shm.buffer.addr,
        )
        try:
            with trio.CancelScope(shield=True):
                answer = await self._host.calls.hypercall(
                    Hypercall.DEVSHM, lambda _: abi.DEVSHM.pack(call)
                )
            result = check(answer.result, f"{self.name}: DEVSHM of {shm.id}")
        except BaseException:
            if shm.cookie:
                self._host.remove_signal(shm.cookie)
            raise
        self._shared[shm.id] = shm
        if shm.cookie:
            shm.handle = result
        if self._ended is not None:
            self._end_signals(self._ended)
            raise again(self._ended)
        if shm.cookie:
            self._host.function.add_doorbell(BAR_SIGNALS, SIGNAL_SHM, result)
        return shm

    # For the bridge driver

    def lose(self, error: VbusError) -> None:
        """The device is gone for good."""
        if self._gone is None:
            self._gone = error
            self.disconnect(error)
            self.gone.set()

    def disconnect(self, error: VbusError) -> None:
        """The host has ended the connection; `close` frees what is left of it."""
        if self._ended is None:
            self._ended = error
            self._end_signals(error)
            for abort in self._under_way:
                abort(error)

    def _release(self) -> None:
        self._end_signals(NoDeviceError(f"{self.name} is closed"))
        self._shared.clear()
        buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.close()

    def _end_signals(self, error: VbusError) -> None:
        function = self._host.function
        for shm in self._shared.values():
            if shm.cookie:
                self._host.remove_signal(shm.cookie)
                shm.cookie = 0
            if shm.handle is not None:
                function.remove_doorbell(BAR_SIGNALS, SIGNAL_SHM, shm.handle)
                shm.handle = None
            shm.wake.fail(error)

    def _connected(self) -> int:
        """Give the handle; raise the error if there is no connection (any more)."""
        if self._ended is not None:
            raise again(self._ended)
        if not self._handle:
            raise InvalidError(f"{self.name} is not open")
        return self._handle

    def statistics(self) -> DeviceStatistics:
        """A snapshot of the counters."""
        return DeviceStatistics(
            self._opens, self._calls, self._refused, len(self._shared)
        )


async def open_device(
    calls: Calls, id: int | None, name: str, version: int
) -> abi.DeviceOpen:
    """Open a device by id or, without one, by name; give its id and the handle."""
    if id is not None:
        vector: int = Hypercall.DEVOPEN
        argument = abi.DEVOPEN.pack(abi.DeviceOpen(id, version, 0))
    else:
        encoded = name.encode()
        if len(encoded) > abi.NAME_LIMIT:
            raise InvalidError(f"{name!r} is longer than a device's name can be")
        vector = Hypercall.DEVOPEN_NAME
        argument = abi.DEVOPEN_NAME.pack(abi.DeviceOpenName(version, encoded, 0, 0))
    answer = await calls.hypercall(vector, lambda _: argument)
    check(answer.result, f"DEVOPEN of {name}")
    if id is not None:
        return abi.DEVOPEN.unpack(answer.argument)
    found = abi.DEVOPEN_NAME.unpack(answer.argument)
    return abi.DeviceOpen(found.devid, version, found.handle)
