"""Runs in the guest: a driver that gives the host addresses which are not its own.

`test_lies.py` puts this file there. Results are what the host answered.
"""

import ctypes
import fcntl
import mmap
import random
import struct
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ioq import Index, Ring, ring_size
from proxy.bridge import BridgeDriver
from proxy.calls import Calls
from proxy.device import DeviceProxy, NorthConsumer, SharedMemory
from proxy.guest import attach
from proxy.linux import vfio
from proxy.linux.function import choose, open_function
from proxy.linux.physical import reserve
from proxy.memory import HUGE_PAGE_SIZE
from shm import Locality, View, create_memfd
from vbus import abi
from vbus.abi import BridgeCall, Hypercall
from vbus.errors import VbusError
from vbus.pci.constants import Command

SPARE = 8 << 30
"""Where the spare memory is to the function while it is mapped."""
_UNMAP_DMA = (ord(";") << 8 | 100) + 14
_ENABLED = Command.MEMORY | Command.IO | Command.BUS_MASTER
_FRAME = (1 << 55) - 1
_SLOT = 2048
_LINKUP = 0
_CANARY = b"canary!!"


# Calls with addresses of our choice


class Caller:
    """Calls on an open echo device, by the numbers."""

    def __init__(self, bridge: BridgeDriver, device: DeviceProxy) -> None:
        self.calls = bridge.calls
        self.device = device
        self._channel = 1000

    async def window(self, number: int, size: int, at: int) -> int:
        return await self.calls._execute(number, size, at)

    async def call(self, size: int, at: int) -> int:
        call = abi.DeviceCall(self.device._handle, 0, size, 0, at)
        packed = abi.DEVCALL.pack(call)
        answer = await self.calls.hypercall(Hypercall.DEVCALL, lambda _: packed)
        return answer.result

    async def share(self, size: int, at: int) -> int:
        call = abi.DeviceShm(self.device._handle, 0, size, 0, 8, 0, 1 << 40, at)
        packed = abi.DEVSHM.pack(call)
        answer = await self.calls.hypercall(Hypercall.DEVSHM, lambda _: packed)
        return answer.result

    async def channel(self, at: int) -> int:
        self._channel += 1
        call = abi.CallDescriptor(self._channel, abi.FASTCALL.size, at)
        argument = abi.CALL.pack(call)
        result, _ = await self.calls.bridge_call(BridgeCall.FASTCALL_ADD, argument)
        return result

    async def everything(self, at: int) -> dict[str, int]:
        """Every kind of call there is, with its memory at `at`."""
        return {
            "negotiate": await self.window(
                BridgeCall.NEGOTIATE, abi.NEGOTIATE.size, at
            ),
            "slow call": await self.window(BridgeCall.SLOWCALL, abi.CALL.size, at),
            "channel": await self.channel(at),
            "call": await self.call(64, at),
            "share": await self.share(4096, at),
        }


async def calls_at(places: list[int]) -> list[dict[str, int]]:
    """Every call at every place; afterwards a good one must work."""
    async with attach(memory_mib=4) as bridge:
        device = await bridge.device("echo0")
        async with device.opened():
            caller = Caller(bridge, device)
            results = [await caller.everything(at) for at in places]
            assert await device.call(0, b"still here") == (0, b"still here")
            return results


# Rings with descriptors of our choice


async def lying_rings(reads: list[int], writes: list[int]) -> list[str]:
    """For each place a connection whose device is sent there; give how each ended."""
    async with attach(memory_mib=4) as bridge:
        device = await bridge.device("echo0")
        ends = [await _lying_ring(device, at, None) for at in reads]
        ends += [await _lying_ring(device, None, at) for at in writes]
        async with device.opened():
            assert await device.call(0, b"still here") == (0, b"still here")
        return ends


async def _lying_ring(device: DeviceProxy, read: int | None, write: int | None) -> str:
    async with device.opened():
        honest = device.allocate(4096)
        requests, shared = device.new_ring(0, 4)
        replies, answered = device.new_ring(1, 4)
        replies.push([(1, write or honest.addr, 64)], Index.VALID)
        await device.share_ring(shared)
        await device.share_ring(answered)
        requests.push([(1, read or honest.addr, 64)], Index.INUSE)
        requests.signal.inject()
        return await _end_of(answered)


async def _end_of(shared: SharedMemory) -> str:
    """Wait until the host has closed the memory's signal; give what it told us."""
    with trio.move_on_after(5):
        try:
            while True:
                await shared.wake.wait()
        except VbusError as error:
            return type(error).__name__
    return "nothing happened"


async def lying_event_queues(bad: int) -> dict[str, int]:
    """QREG with the ring there, with the data there, and with descriptors to there."""
    async with open_function(choose(), 4 << 20, lambda _: None) as function:
        calls, found = Calls(function), {}
        memory = function.memory
        await function.set_command(_ENABLED, on=True)
        for what in ("ring", "data", "descriptors"):
            offer = abi.NEGOTIATE.pack(abi.Negotiate(abi.NEGOTIATE_MAGIC, 1, 0))
            result, _ = await calls.bridge_call(BridgeCall.NEGOTIATE, offer)
            assert result == 1
            buffer = memory.allocate(ring_size(4), alignment=4096)
            Ring.format(buffer.view, 4)
            ring = Ring(buffer.view, memory.space, Locality.NORTH, lambda: None)
            ring.push([(n, bad, 144) for n in range(4)], Index.VALID)
            ring.signal.enable()
            data = memory.allocate(4 * abi.EVENT_SIZE)
            entry = abi.QueueEntry(
                4,
                bad if what == "ring" else buffer.addr,
                bad if what == "data" else data.addr,
            )
            found[what], _ = await calls.bridge_call(
                BridgeCall.QREG, abi.pack_qreg([entry])
            )
        await function.set_command(Command.BUS_MASTER, on=False)
        calls.close()
        return found


# Memory that comes and goes behind the IOMMU


class Spare:
    """Three pages that follow each other in the machine; the middle can be mapped."""

    def __init__(self, bridge: BridgeDriver, container: vfio.Container) -> None:
        reserve(64)
        self._container = container
        self._bridge = bridge
        self.fd = create_memfd("spare", 24 * HUGE_PAGE_SIZE, huge=True)
        self.pages = mmap.mmap(self.fd, 24 * HUGE_PAGE_SIZE)
        self.middle = self._neighbours()
        bridge.function.memory.space.map(
            SPARE, HUGE_PAGE_SIZE, self.fd, self.middle * HUGE_PAGE_SIZE
        )

    def _neighbours(self) -> int:
        """Fill all, and find a page between two of the same physical neighbourhood."""
        self.pages[:] = _CANARY * (len(self.pages) // 8)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self._start = start
        frames = []
        with open("/proc/self/pagemap", "rb") as pagemap:
            for number in range(24):
                pagemap.seek((start + number * HUGE_PAGE_SIZE) // 4096 * 8)
                (entry,) = struct.unpack("Q", pagemap.read(8))
                frames.append((entry & _FRAME) // 512)
        for middle in range(1, 23):
            if {abs(frames[middle] - frames[middle + by]) for by in (-1, 1)} == {1}:
                return middle
        raise AssertionError(f"no three pages in a row: {frames}")

    def map(self, page: int | None = None) -> None:
        at = self._start + (self.middle if page is None else page) * HUGE_PAGE_SIZE
        self._container.map_dma(at, SPARE, HUGE_PAGE_SIZE)

    def unmap(self) -> None:
        about = bytearray(struct.pack("=IIQQ", 24, 0, SPARE, HUGE_PAGE_SIZE))
        fcntl.ioctl(self._container.fd, _UNMAP_DMA, about)
        assert struct.unpack("=IIQQ", about)[3] == HUGE_PAGE_SIZE

    def page(self, number: int) -> bytes:
        return self.pages[number * HUGE_PAGE_SIZE : (number + 1) * HUGE_PAGE_SIZE]

    def intact(self) -> bool:
        """All pages but the middle are as they were filled."""
        full = _CANARY * (HUGE_PAGE_SIZE // 8)
        return all(self.page(n) == full for n in range(24) if n != self.middle)


@asynccontextmanager
async def _with_spare() -> AsyncIterator[tuple[BridgeDriver, Spare]]:
    containers, original = [], vfio._open_container

    def remember() -> vfio.Container:
        containers.append(original())
        return containers[0]

    vfio._open_container = remember
    async with attach(memory_mib=16) as bridge:
        yield bridge, Spare(bridge, containers[0])


async def use_after_unmap() -> dict[str, object]:
    """Share memory, unmap it, use it; then map other memory in its place."""
    found: dict[str, object] = {}
    async with _with_spare() as (bridge, spare):
        device = await bridge.device("echo0")
        async with device.opened():
            caller = Caller(bridge, device)
            edges = (SPARE - 4, SPARE + HUGE_PAGE_SIZE - 4)
            found["never mapped"] = await caller.everything(SPARE)
            spare.map()
            found["edges"] = [await caller.everything(at) for at in edges]
            found["mapped"] = await caller.call(64, SPARE)
            spare.unmap()
            found["unmapped"] = await caller.everything(SPARE)
            spare.map()
            requests, shared = _ring_in(bridge, device, SPARE + 4096)
            await device.share_ring(shared)
            replies, answered = device.new_ring(1, 4)
            replies.push([(1, device.allocate(64).addr, 64)], Index.VALID)
            await device.share_ring(answered)
            found["channel"] = await caller.channel(SPARE + 8192)
            used = caller._channel.to_bytes(4, "little")
            spare.unmap()
            was = spare.page(spare.middle)
            await bridge.function.bar_write(abi.BAR_SIGNALS, abi.SIGNAL_FASTCALL, used)
            other = (spare.middle + 3) % 24
            spare.map(other)
            await bridge.function.bar_write(abi.BAR_SIGNALS, abi.SIGNAL_FASTCALL, used)
            requests.push([(1, SPARE, 64)], Index.INUSE)
            requests.signal.inject()
            was_pushed = spare.page(spare.middle)
            found["ring"] = await _end_of(answered)
            found["unmapped is unchanged"] = spare.page(spare.middle) == was_pushed
            found["calls left it"] = was[8192:] == was_pushed[8192:]
            found["its successor is unchanged"] = spare.intact()
            spare.unmap()
        async with device.opened():
            found["again"] = (await device.call(0, b"again"))[0]
        found["intact"] = spare.intact()
    return found


def _ring_in(
    bridge: BridgeDriver, device: DeviceProxy, at: int
) -> tuple[Ring, SharedMemory]:
    """Lay a ring at an address of the spare memory."""
    ring, shared = device.new_ring(0, 4)
    honest = shared.buffer
    shared.buffer = _Placed(bridge.function.memory.space.view(at, honest.size), at)
    Ring.format(shared.buffer.view, 4)
    ring = Ring(
        shared.buffer.view,
        bridge.function.memory.space,
        Locality.NORTH,
        device.notifier(shared),
    )
    shared.signal = ring.signal
    return ring, shared


class _Placed:
    """What a DmaBuffer is to who shares it."""

    def __init__(self, view: View, addr: int) -> None:
        self.view, self.addr, self.size = view, addr, view.size


async def unmap_while_copied(rounds: int, seed: int) -> dict[str, object]:
    """Echo and network devices copy from and to memory that goes at any moment."""
    noise, late, ends = random.Random(seed), 0, []
    copied = {"echo": 0, "frames": 0}
    async with _with_spare() as (bridge, spare):
        echo = await bridge.device("echo0")
        net = await bridge.device("net-vm1")
        for done in range(rounds):
            spare.map()
            async with echo.opened(), net.opened(), trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + 5
                nursery.start_soon(_pump_echo, echo, copied, ends)
                nursery.start_soon(_pump_frames, net, copied)
                await trio.sleep(noise.uniform(0.02, 0.1))
                await trio.to_thread.run_sync(spare.unmap)
                was = spare.page(spare.middle)
                # Our own sends go on into the memory, so compare what only the
                # host writes: the buffers for replies.
                await trio.sleep(0.02)
                now = spare.page(spare.middle)
                late += was[1 << 20 :] != now[1 << 20 :]
                while len(ends) == done:  # noqa: ASYNC110 - frames are only counted
                    await trio.sleep(0.002)
                nursery.cancel_scope.cancel()
        intact = spare.intact()
        async with echo.opened():
            again = (await echo.call(0, b"again"))[0]
    return {"late": late, "ends": ends, "copied": copied, "intact": intact} | {
        "again": again
    }


async def _pump_echo(
    device: DeviceProxy, copied: dict[str, int], ends: list[str]
) -> None:
    """Messages and their replies lie in the spare memory, until the host gives up."""
    requests = await device.producer(0, 64, slot_size=64)
    ring, shared = device.new_ring(1, 64)
    at = SPARE + (1 << 20)
    ring.push([(n, at + n * _SLOT, _SLOT) for n in range(64)], Index.VALID)
    await device.share_ring(shared)
    replies = NorthConsumer(ring, shared.wake, _SLOT, None)
    message = bytearray(_SLOT * 32)
    try:
        while True:
            for n in range(0, len(message), 512):
                message[n] = copied["echo"] & 0xFF
            await requests.send(message, _SLOT, slots=(SPARE, _SLOT))
            answer, sizes = bytearray(len(message)), array("I", [0] * 32)
            copied["echo"] += await replies.receive(answer, sizes)
    except VbusError as error:
        ends.append(type(error).__name__)


async def _pump_frames(device: DeviceProxy, copied: dict[str, int]) -> None:
    """Bulk transmission of broadcast frames out of the spare memory."""
    await device.consumer(0, 256, slot_size=_SLOT)
    frames = await device.producer(1, 256, slot_size=64)
    await device.call(_LINKUP)
    frame = b"\xff" * 6 + b"\x02liar!" + b"\x88\xb6" + b"liar" * 375
    while True:
        await frames.send(frame * 64, len(frame), slots=(SPARE + 65536, _SLOT))
        copied["frames"] += 64
