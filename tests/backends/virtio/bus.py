"""A guest that speaks the calls of type "virtio" by hand, on a device that runs."""

import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio
import trio.testing

from backends.virtio.adapter import VirtioOnBus
from proxy.virtio.ring import DriverQueue, RingLayout
from vbus.bus import BusModel
from vbus.device import Device
from vbus.testing import NurseryEffects, RecordedBridge
from vbus.testing.peer import Shared
from vbus.virtio import adapter as abi
from vbus.virtio.adapter import CONFIG_SHM, Func
from vbus.virtio.common import Status

SETUP = Status.ACKNOWLEDGE | Status.DRIVER
LIVE = SETUP | Status.FEATURES_OK | Status.DRIVER_OK
SIGNAL_AT = 0xFC0


class BusGuest:
    """One open connection; refusals are OSErrors."""

    def __init__(self, recorded: RecordedBridge, device: VirtioOnBus) -> None:
        self.recorded = recorded
        self.peer = recorded.peer
        self.device = device
        self.handle = 0
        self.features = 0
        self.shared: dict[int, Shared] = {}

    async def call(self, func: int, data: bytes = b"") -> tuple[int, bytes]:
        return await self.peer.call(self.handle, func, data)

    async def status(self, *value: int) -> int:
        if not value:
            return (await self.call(Func.GETSTATUS))[0]
        return (await self.call(Func.SETSTATUS, abi.STATUS.pack(*value)))[0]

    async def negotiate(self, features: int) -> int:
        """Up to FEATURES_OK; gives the status."""
        self.features = features
        await self.status(0)
        await self.status(SETUP)
        for select in range(2):
            word = features >> 32 * select & 0xFFFF_FFFF
            await self.call(Func.SETFEATURES, abi.FEATURES.pack(select, word))
        return await self.status(SETUP | Status.FEATURES_OK)

    async def share(self, id: int, size: int = 4096) -> Shared:
        """Page-aligned memory with its signal at SIGNAL_AT, enabled towards us."""
        self.peer.allocate(0, 4096)
        at = SIGNAL_AT if size > SIGNAL_AT else 0
        shared = await self.peer.share(self.handle, id, size, signal_offset=at)
        shared.view.write(at + 8, b"\1")
        self.shared[id] = shared
        return shared

    async def enable(
        self, index: int, size: int, desc: int, driver: int, device: int
    ) -> None:
        data = abi.ENABLE.pack(index, size, desc, driver, device, 0)
        await self.call(Func.ENABLEQUEUE, data)

    async def make_ring(self, index: int, size: int) -> DriverQueue:
        """A ring over the shared memory, in the layout of the examples."""
        shared = self.shared[index]
        driver = 16 * size
        device = -(-(driver + 6 + 2 * size) // 16) * 16
        at = shared.view.addr
        ring = DriverQueue(
            self.peer.memory,
            size,
            RingLayout(at, at + driver, at + device),
            self.features,
        )
        await self.enable(index, size, 0, driver, device)
        return ring

    def kick(self, index: int) -> None:
        """North's inject, by hand: dirty, and pending if it crosses."""
        shared = self.shared[index]
        at = SIGNAL_AT
        shared.view.write(at + 13, b"\1")
        if shared.view.read(at + 11, 2) == b"\1\0":
            shared.view.write(at + 12, b"\1")
            self.peer.signal(8, shared.handle)

    def kick_if_shared(self, index: int) -> None:
        if index in self.shared:
            self.kick(index)

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        self.recorded.effects.answer_doorbells()
        self.peer.take_events()
        await trio.testing.wait_all_tasks_blocked()

    def signalled(self, id: int) -> bool:
        """Did SHMSIGNAL come for this memory since asked last?"""
        return self.shared[id].doorbell.drain()

    async def live(
        self, index: int = 0, size: int = 8, *, features: int
    ) -> DriverQueue:
        """All the way to DRIVER_OK with one queue and the configuration's signal."""
        await self.share(CONFIG_SHM, 64)
        await self.share(index)
        assert await self.negotiate(features) & Status.FEATURES_OK
        ring = await self.make_ring(index, size)
        assert await self.status(LIVE) == LIVE
        return ring

    def word(self, index: int, form: str, at: int) -> int:
        data = self.shared[index].view.read(at, struct.calcsize("<" + form))
        value: int = struct.unpack("<" + form, data)[0]
        return value


@asynccontextmanager
async def on_bus(
    device_class: type[VirtioOnBus],
    *,
    open: bool = True,
    others: Mapping[str, type[Device]] | None = None,
    **attributes: object,
) -> AsyncIterator[BusGuest]:
    """The device on a bus, its tasks running, and a guest that has opened it.

    `others` are made before it, under the same names.
    """
    async with trio.open_nursery() as nursery:
        effects = NurseryEffects(nursery)
        model = BusModel({"device": device_class, **(others or {})})
        with RecordedBridge(model=model, effects=effects) as recorded:
            effects.failed = recorded.bridge.connection_failed
            for name in others or {}:
                model.add_device(name, name)
            interface = recorded.add("device0", "device", **attributes)
            device = interface.device
            assert isinstance(device, VirtioOnBus)
            nursery.start_soon(device.serve)
            await recorded.peer.start()
            guest = BusGuest(recorded, device)
            if open:
                guest.handle = await recorded.peer.open(interface.id)
            try:
                yield guest
                await trio.testing.wait_all_tasks_blocked()
            finally:
                model.remove_device("device0")
        nursery.cancel_scope.cancel()
