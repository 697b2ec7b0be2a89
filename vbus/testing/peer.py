"""The driver of a guest, in the same process as the bridge it drives.

Has memory of its own (a memfd which the bridge maps), takes interrupts, and does what
a guest's bridge driver does, or lets a test do it wrong: every step is open to it.
"""

import os
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ioq import Index, Ring, ring_size
from shm import AddressSpace, Doorbell, Locality, ShmSignal, View, create_memfd
from vbus import abi
from vbus.abi import BridgeCall, Event, Hypercall
from vbus.pci.constants import Command, Irq, Offset, Region
from vbus.pci.function import PciFunction, Pending
from vbus.pci.pending import settle

T = TypeVar("T")
RING_SIGNAL_OFFSET = 8
STALE_RESULT = -0x21524111
"""Preset into a fast-call descriptor; stays there if the host writes nothing."""


def now(operation: Coroutine[Any, Any, T]) -> T:
    """Finish an operation that has nothing to wait for, outside of trio."""
    try:
        operation.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    operation.close()
    raise AssertionError("the operation has to wait")


@dataclass(eq=False)
class Shared:
    """Memory that the peer shared: its address and view, and its signal."""

    id: int
    addr: int
    view: View
    handle: int = 0
    cookie: int = 0
    doorbell: Doorbell = field(default_factory=Doorbell)
    """Rung for each SHMSIGNAL event."""
    closed: bool = False
    """SHMCLOSE came."""


@dataclass(eq=False)
class NorthRing(Shared):
    """A shared ring, seen from its north end."""

    ring: Ring = field(kw_only=True)


class _Queue:
    """An event queue the peer registered."""

    def __init__(self, ring: Ring, view: View, data: int) -> None:
        self.ring = ring
        self.view = view
        self.data = data
        self.head = ring.iterator(Index.INUSE)


class GuestPeer:
    """A guest with `size` bytes of memory at `base`, driving one function."""

    def __init__(
        self, bridge: PciFunction, *, base: int = 0x1230_0000, size: int = 1 << 24
    ) -> None:
        self.bridge = bridge
        self.base = base
        self.size = size
        self.fd = create_memfd("guest", size)
        self.memory = AddressSpace()
        self.memory.map(base, size, self.fd)
        self.interrupts: list[tuple[int, int]] = []
        self.vectors: set[tuple[int, int]] = {(Irq.MSI, 0)}
        """The interrupts for which an eventfd is set."""
        self.queues: list[_Queue] = []
        self.shared: dict[int, Shared] = {}
        self.capabilities = 0
        self._free = base
        self._call_block = self.allocate(4096)
        self._channels: dict[int, int] = {}
        self._next_cookie = 0xFFFF_8880_0000_1000

    # Attaching

    def trigger(self, index: int, vector: int) -> bool:
        """Take an interrupt (InterruptSink)."""
        if (index, vector) not in self.vectors:
            return False
        self.interrupts.append((index, vector))
        return True

    def attach(self, *, bus_master: bool = True) -> None:
        """Come as the function's client, with memory; enable bus mastering."""
        self.bridge.attach(self)
        self.bridge.memory.map(self.base, self.size, self.fd)
        self.set_bus_master(bus_master)

    def set_bus_master(self, enabled: bool) -> None:
        """Write the command register."""
        command = Command.IO | Command.MEMORY
        if enabled:
            command |= Command.BUS_MASTER
        self.bridge.write(Region.CONFIG, Offset.COMMAND, command.to_bytes(2, "little"))

    def detach(self) -> None:
        """Go away as a killed guest does."""
        self.bridge.detach()
        self.bridge.memory.clear()
        self._forget()

    def close(self) -> None:
        """Free the peer's own memory and doorbells."""
        self._forget()
        self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def allocate(self, size: int, align: int = 64) -> int:
        """Give zeroed memory. Never freed; MemoryError when used up."""
        addr = -(-self._free // align) * align
        if addr + size > self.base + self.size:
            raise MemoryError("the peer's memory is used up")
        self._free = addr + size
        return addr

    # Registers and calls

    async def _settled(self, answer: bytes | Pending | None) -> bytes | None:
        return await settle(answer) if isinstance(answer, Pending) else answer

    async def bridge_call(self, vector: int, argument: bytes) -> tuple[int, bytes]:
        """Do a bridge call through BAR0; gives the result and the argument after it."""
        self.memory.write(self._call_block, argument)
        result = await self.bridge_call_at(vector, len(argument), self._call_block)
        return result, self.memory.read(self._call_block, len(argument))

    async def bridge_call_at(self, vector: int, length: int, gpa: int) -> int:
        """Write the three registers word by word, then read the first."""
        registers = abi.CALL.pack(abi.CallDescriptor(vector, length, gpa))
        for at in range(0, len(registers), 4):
            self.bridge.write(abi.BAR_CALLS, at, registers[at : at + 4])
        answer = await self._settled(self.bridge.read(abi.BAR_CALLS, 0, 4))
        assert answer is not None
        (result,) = abi.RESULT.unpack(answer)
        return int(result)

    def signal(self, offset: int, value: int) -> Pending | None:
        """Write to the signal window."""
        return self.bridge.write(abi.BAR_SIGNALS, offset, value.to_bytes(4, "little"))

    async def negotiate(self, offer: int = 0) -> int:
        """NEGOTIATE; the result, and `capabilities` holds what was accepted."""
        self._forget()
        argument = abi.NEGOTIATE.pack(
            abi.Negotiate(abi.NEGOTIATE_MAGIC, abi.HYPERCALL_VERSION, offer)
        )
        result, after = await self.bridge_call(BridgeCall.NEGOTIATE, argument)
        self.capabilities = abi.NEGOTIATE.unpack(after).capabilities
        return result

    async def add_channel(self, id: int = 0) -> int:
        """FASTCALL_ADD with a fresh descriptor."""
        gpa = self.allocate(abi.FASTCALL.size)
        argument = abi.CALL.pack(abi.CallDescriptor(id, abi.FASTCALL.size, gpa))
        result, _ = await self.bridge_call(BridgeCall.FASTCALL_ADD, argument)
        if result == 0:
            self._channels[id] = gpa
        return result

    async def register_queues(self, queues: int = 1, descriptors: int = 1024) -> int:
        """QREG with fresh rings, all buffers posted and the north side enabled."""
        made = [self._make_queue(descriptors) for _ in range(queues)]
        entries = [
            abi.QueueEntry(descriptors, queue.view.addr, queue.data) for queue in made
        ]
        result, _ = await self.bridge_call(BridgeCall.QREG, abi.pack_qreg(entries))
        if result == 0:
            self.queues = made
        return result

    def _make_queue(self, descriptors: int) -> _Queue:
        size = ring_size(descriptors)
        view = self.memory.view(self.allocate(size), size)
        data = self.allocate(abi.EVENT_SIZE * descriptors)
        Ring.format(view, descriptors)
        ring = Ring(view, self.memory, Locality.NORTH, lambda: None)
        ring.push(
            [
                (0xC0000000 + at, data + abi.EVENT_SIZE * at, abi.EVENT_SIZE)
                for at in range(descriptors)
            ],
            index=Index.VALID,
        )
        ring.signal.enable()
        return _Queue(ring, view, data)

    async def start(self, offer: int = 0, *, queues: int = 1, size: int = 1024) -> None:
        """Do the whole handshake of the Linux driver: 2.5."""
        assert await self.negotiate(offer) == abi.HYPERCALL_VERSION
        assert await self.add_channel(0) == 0
        assert await self.register_queues(queues, size) == 0

    async def hypercall(
        self, vector: int, argument: bytes, *, channel: int | None = 0
    ) -> tuple[int, bytes]:
        """Do a hypercall by fast call, or by SLOWCALL with `channel` None."""
        gpa = self.allocate(len(argument)) if channel else self._call_block + 1024
        self.memory.write(gpa, argument)
        result = await self.hypercall_at(vector, len(argument), gpa, channel=channel)
        return result, self.memory.read(gpa, len(argument))

    async def hypercall_at(
        self, vector: int, length: int, gpa: int, *, channel: int | None = 0
    ) -> int:
        """Do a hypercall whose argument is in place."""
        descriptor = abi.CallDescriptor(vector, length, gpa)
        if channel is None:
            argument = abi.CALL.pack(descriptor)
            return (await self.bridge_call(BridgeCall.SLOWCALL, argument))[0]
        at = self._channels[channel]
        self.memory.write(
            at, abi.FASTCALL.pack(abi.FastCall(*descriptor, STALE_RESULT))
        )
        await self._settled(self.signal(abi.SIGNAL_FASTCALL, channel))
        return abi.FASTCALL.unpack(self.memory.read(at, abi.FASTCALL.size)).result

    # What drivers do; a refusal is raised as the OSError of its errno

    async def open(self, devid: int, version: int = 1, *, channel: int = 0) -> int:
        """DEVOPEN; gives the handle."""
        argument = abi.DEVOPEN.pack(abi.DeviceOpen(devid, version, 0))
        result, after = await self.hypercall(
            Hypercall.DEVOPEN, argument, channel=channel
        )
        _check(result)
        return abi.DEVOPEN.unpack(after).handle

    async def open_name(self, name: str, version: int = 1) -> tuple[int, int]:
        """DEVOPEN_NAME; gives the device id and the handle."""
        argument = abi.DEVOPEN_NAME.pack(
            abi.DeviceOpenName(version, name.encode(), 0, 0)
        )
        result, after = await self.hypercall(Hypercall.DEVOPEN_NAME, argument)
        _check(result)
        opened = abi.DEVOPEN_NAME.unpack(after)
        return opened.devid, opened.handle

    async def close_device(self, handle: int, *, channel: int = 0) -> None:
        """DEVCLOSE."""
        argument = abi.DEVCLOSE.pack(abi.DeviceClose(handle))
        result, _ = await self.hypercall(Hypercall.DEVCLOSE, argument, channel=channel)
        _check(result)

    async def call(
        self,
        handle: int,
        func: int,
        data: bytes = b"",
        flags: int = 0,
        *,
        channel: int = 0,
    ) -> tuple[int, bytes]:
        """DEVCALL; gives the result (>= 0) and the data after the call."""
        gpa = self._call_block + 2048 if len(data) <= 2048 else self.allocate(len(data))
        if channel:
            gpa = self.allocate(len(data))
        self.memory.write(gpa, data)
        argument = abi.DEVCALL.pack(abi.DeviceCall(handle, func, len(data), flags, gpa))
        result, _ = await self.hypercall(Hypercall.DEVCALL, argument, channel=channel)
        return _check(result), self.memory.read(gpa, len(data))

    async def share(
        self,
        handle: int,
        id: int,
        size: int,
        *,
        signal_offset: int | None = None,
        prio: int = 0,
        channel: int = 0,
    ) -> Shared:
        """DEVSHM of fresh memory, with a signal formatted at `signal_offset`."""
        addr = self.allocate(size)
        shared = Shared(id, addr, self.memory.view(addr, size))
        if signal_offset is not None:
            ShmSignal.format(shared.view, signal_offset)
        await self._share(shared, handle, signal_offset, prio, channel)
        return shared

    async def share_ring(
        self, handle: int, id: int, descriptors: int = 256, *, prio: int = 0
    ) -> NorthRing:
        """DEVSHM of a fresh ring, whose north side is enabled."""
        size = ring_size(descriptors)
        addr = self.allocate(size)
        view = self.memory.view(addr, size)
        Ring.format(view, descriptors)
        ring = Ring(
            view,
            self.memory,
            Locality.NORTH,
            lambda: self.signal(abi.SIGNAL_SHM, shared.handle),
        )
        shared = NorthRing(id, addr, view, ring=ring)
        await self._share(shared, handle, RING_SIGNAL_OFFSET, prio)
        ring.signal.enable()
        return shared

    async def _share(
        self,
        shared: Shared,
        handle: int,
        signal_offset: int | None,
        prio: int,
        channel: int = 0,
    ) -> None:
        offset = abi.NO_SIGNAL if signal_offset is None else signal_offset
        shared.cookie = self._next_cookie
        self._next_cookie += 64
        argument = abi.DeviceShm(
            handle,
            shared.id,
            shared.view.size,
            0,
            offset,
            prio,
            shared.cookie,
            shared.addr,
        )
        result, _ = await self.hypercall(
            Hypercall.DEVSHM, abi.DEVSHM.pack(argument), channel=channel
        )
        if result < 0 or signal_offset is None:
            shared.doorbell.close()  # nothing will ever ring it
        shared.handle = _check(result)
        if signal_offset is not None:
            self.shared[shared.cookie] = shared

    # Events

    def take_events(self, limit: int | None = None) -> list[Event]:
        """Be the interrupt handler: take what is in the rings, highest queue first.

        Zeroes and hands back each buffer, rings the doorbells of signalled memory,
        and signals the queues. With a `limit` it stops there, still in its handler.
        """
        taken: list[Event] = []
        for index in reversed(range(len(self.queues))):
            if len(taken) != limit:
                self._drain(index, taken, limit)
        return taken

    def _drain(self, index: int, taken: list[Event], limit: int | None) -> None:
        queue = self.queues[index]
        signal = queue.ring.signal
        again = True
        while again:
            signal.wakeup_begin()
            while (event := self._next_event(queue)) is not None:
                taken.append(event)
                self._handle(event)
                if len(taken) == limit:
                    return  # still at work: the host raises no interrupt meanwhile
            again = signal.wakeup_end()
        if signal.inject():
            self.signal(abi.SIGNAL_EVENTQ, index)

    def _next_event(self, queue: _Queue) -> Event | None:
        head = queue.head
        head.seek_head()
        if head.owner != Locality.NORTH or not queue.ring.entries():
            return None
        record = self.memory.read(head.ptr, abi.EVENT_SIZE)
        self.memory.write(head.ptr, bytes(abi.EVENT_SIZE))
        head.pop()
        return abi.EVENT.unpack(record)

    def _handle(self, event: Event) -> None:
        shared = self.shared.get(event.handle)
        if event.eventid == abi.EventId.SHMSIGNAL:
            assert shared is not None, "SHMSIGNAL with an unknown cookie"
            assert not shared.closed, "SHMSIGNAL after SHMCLOSE"
            if isinstance(shared, NorthRing):
                shared.ring.signal.wakeup_begin()
                shared.ring.signal.wakeup_end()
            shared.doorbell.ring()
        elif event.eventid == abi.EventId.SHMCLOSE:
            assert shared is not None, "SHMCLOSE with an unknown cookie"
            assert not shared.closed, "a second SHMCLOSE"
            shared.closed = True

    def _forget(self) -> None:
        """Drop what belongs to a session."""
        self.queues = []
        self._channels = {}
        for shared in self.shared.values():
            shared.doorbell.close()
        self.shared = {}


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
