"""The driver of "virtual-ethernet": a network interface in the guest (ABI section 7).

Follows ABI 7.10: negotiate, share rings and pools, fill them, LINKUP. Frames then go
between the rings and a TAP in this process's network namespace, up to 64 KiB each; or,
where no TAP may be made, come from and go to a generator of frames.
"""

import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import trio

from ioq import Ring
from proxy.device import DeviceProxy, SharedMemory
from proxy.drivers.frames import ExchangeStatistics, FrameExchange
from proxy.drivers.tap import have_tun, interface_name
from proxy.memory import DmaBuffer
from shm import View
from vbus.errors import InvalidError, VbusError
from vbus.net import (
    GuestEnd,
    GuestPump,
    GuestRings,
    GuestStatistics,
    MacAddress,
    Tap,
    TapStatistics,
)
from vbus.net.interface import check_name, parse_address

LINKUP, LINKDOWN, MACQUERY, NEGCAP, _, PMTDQUERY, EVQQUERY, L4ROQUERY = range(8)
GROUP_TX, GROUP_EVENTS, GROUP_RX = range(3)
SG, PMTD, TXC = 1 << 0, 1 << 5, 1 << 1
ALL_TX, ALL_EVENTS, ALL_RX = 0x2F, 0x03, 0x0F
RX_RING, TX_RING = 0, 1

RING_COUNT = 256
SG_SLOT = 320
EVENT_SIZE = 24
ARENA_SIZE = 2 << 20
PAGE_SIZE = 16 << 10
ETHERNET_HEADER = 14
_LINE = 64

_CAPABILITIES = struct.Struct("<II")
_EVENT_QUERY = struct.Struct("<IIII16x")
_L4RO_QUERY = struct.Struct("<III20x")


class VenetOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one interface can be told. `frames`: generate frames instead of a TAP."""

    address: str | None = None
    mtu: int = 1500
    ifname: str | None = None
    frames: bool = False
    offload: bool = True
    events: bool = False
    spin_us: float = 200.0  # more than a round trip that sleeps, to set in


@dataclass(frozen=True)
class VenetStatistics:
    """One interface; `link` is None unless the device tells, `tap` is the kernel's."""

    ifname: str
    mac: str
    offloads: int
    link: bool | None
    frames: GuestStatistics | None
    tap: TapStatistics | None
    exchange: ExchangeStatistics | None


class VenetDriver:
    """Drives one venet device."""

    def __init__(self, device: DeviceProxy, options: Mapping[str, object]) -> None:
        """Check the options. Raises InvalidError."""
        try:
            self.options = msgspec.convert(dict(options), VenetOptions)
        except msgspec.ValidationError as error:
            raise InvalidError(f"{device.name}: {error}") from error
        self.device = device
        self.mac = MacAddress(bytes(6))
        self.tap: Tap | None = None
        self._address = (
            parse_address(self.options.address) if self.options.address else None
        )
        name = self.options.ifname
        self._ifname = check_name(name) if name else interface_name(device.name)
        self._tx_bits = self._event_bits = self._rx_bits = 0
        self._end: GuestEnd | None = None
        self._pump: GuestPump | None = None
        self._exchange: FrameExchange | None = None

    async def run(self, started: Callable[[str], None]) -> None:
        """Bring the interface up and move frames.

        Raises PermissionDeniedError where no TAP may be made.
        """
        async with self.device.opened():
            await self._negotiate()
            self._pump = pump = await self._share()
            pump.post()
            _, mac = await self.device.call(MACQUERY, out_size=6)
            self.mac = MacAddress(mac)
            if self.options.frames:
                self._exchange = FrameExchange(pump, self.mac)
                await self._up(pump, None, started)
            else:
                await trio.to_thread.run_sync(have_tun)
                with Tap(self._ifname, offload=bool(self._tx_bits & SG)) as self.tap:
                    self.tap.configure(
                        mac=self.mac,
                        mtu=self.options.mtu,
                        address=self._address,
                        up=True,
                    )
                    await self._up(pump, self.tap, started)

    async def _up(
        self, pump: GuestPump, tap: Tap | None, started: Callable[[str], None]
    ) -> None:
        await self.device.call(LINKUP)
        started(f"{tap.name if tap else 'generated frames'}, {self.mac}")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.run, tap)
                if self._exchange is not None:
                    nursery.start_soon(self._exchange.run)
        finally:
            with trio.CancelScope(shield=True), suppress(VbusError):
                await self.device.call(LINKDOWN)

    # Steps 3 to 8 of 7.10

    async def _negotiate(self) -> None:
        if self.options.offload:
            self._tx_bits = await self._agree(GROUP_TX, ALL_TX)
            self._rx_bits = await self._agree(GROUP_RX, ALL_RX)
        if self.options.events:
            self._event_bits = await self._agree(GROUP_EVENTS, ALL_EVENTS)

    async def _agree(self, group: int, bits: int) -> int:
        _, answer = await self.device.call(NEGCAP, _CAPABILITIES.pack(group, bits))
        return int(_CAPABILITIES.unpack(answer)[1]) & bits

    async def _share(self) -> GuestPump:
        """Share what the negotiated formats need and put the end together."""
        self._end = GuestEnd(self._pmtd, self._txc, PAGE_SIZE)
        events = await self._share_events() if self._event_bits else None
        pages = await self._share_large_receive() if self._rx_bits & SG else None
        tx = await self._share_ring("tx", TX_RING)
        rx = await self._share_ring("rx", RX_RING)
        buffer_size = -(-(self.options.mtu + ETHERNET_HEADER) // _LINE) * _LINE
        self._allocate("buffers", RING_COUNT * buffer_size)
        self._allocate("arena", ARENA_SIZE)
        if self._tx_bits & SG:
            pool = self._allocate("tx_pool", RING_COUNT * SG_SLOT)
            if self._pmtd:
                pool_id, _ = await self.device.call(PMTDQUERY)
                await self.device.shm(pool_id, pool)
        rings = GuestRings(
            tx[0],
            rx[0],
            tx[1].wake,
            rx[1].wake,
            events=events[0] if events else None,
            events_wake=events[1].wake if events else None,
            pages=pages[0] if pages else None,
        )
        return GuestPump(self._end, rings, txc=self._txc, spin_us=self.options.spin_us)

    @property
    def _pmtd(self) -> bool:
        return self._tx_bits & (SG | PMTD) == SG | PMTD

    @property
    def _txc(self) -> bool:
        return bool(self._event_bits & TXC)

    async def _share_events(self) -> tuple[Ring, SharedMemory]:
        _, answer = await self.device.call(EVQQUERY, bytes(_EVENT_QUERY.size))
        _, size, pool_id, ring_id = _EVENT_QUERY.unpack(answer)
        if size != EVENT_SIZE:
            raise InvalidError(f"{self.device.name} has events of {size} bytes")
        pool = self._allocate("event_pool", RING_COUNT * EVENT_SIZE)
        await self.device.shm(pool_id, pool)
        return await self._share_ring("events", ring_id)

    async def _share_large_receive(self) -> tuple[Ring, SharedMemory]:
        _, answer = await self.device.call(L4ROQUERY, bytes(_L4RO_QUERY.size))
        _, pool_id, ring_id = _L4RO_QUERY.unpack(answer)
        pool = self._allocate("rx_pool", RING_COUNT * SG_SLOT)
        await self.device.shm(pool_id, pool)
        self._allocate("page_memory", RING_COUNT * PAGE_SIZE)
        return await self._share_ring("pages", ring_id)

    async def _share_ring(self, part: str, id: int) -> tuple[Ring, SharedMemory]:
        ring, shm = await self.device.ring(id, RING_COUNT)
        self._attach(part, ring)
        return ring, shm

    def _allocate(self, part: str, size: int) -> DmaBuffer:
        buffer = self.device.allocate(size, alignment=4096)
        self._attach(part, buffer.view)
        return buffer

    def _attach(self, part: str, memory: Ring | View) -> None:
        assert self._end is not None
        self._end.attach(part, memory)

    def statistics(self) -> VenetStatistics:
        """A snapshot of the counters."""
        pump, tap, exchange = self._pump, self.tap, self._exchange
        return VenetStatistics(
            ifname=tap.name if tap else "",
            mac=str(self.mac),
            offloads=self._tx_bits,
            link=self._end.link if self._end is not None else None,
            frames=pump.statistics() if pump is not None else None,
            tap=tap.statistics() if tap is not None else None,
            exchange=exchange.statistics() if exchange is not None else None,
        )
