"""Drives a virtio network card: a TAP, whose headers go straight through."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import trio

from proxy.drivers.tap import have_tun, interface_name
from proxy.virtio.card import MAX_FRAME, Card, CardStatistics
from proxy.virtio.device import VirtioDevice
from vbus.net import Tap
from vbus.net.interface import check_name, parse_address

_TURN = 64
"""Frames before other tasks and the device get their turn."""


class NetOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one interface can be told; without `mtu` it is the device's.

    `kernel` changes nothing: a TAP is the kernel's anyway.
    """

    address: str | None = None
    mtu: int | None = None
    ifname: str | None = None
    offload: bool = True
    packed: bool = False
    kernel: bool = False


@dataclass(frozen=True)
class NetDriverStatistics:
    """One interface; `out_errors` were refused by its kernel."""

    ifname: str
    mac: str
    features: int
    link: bool
    out_errors: int
    frames: CardStatistics


class NetDriver:
    """Drives one network card."""

    def __init__(self, device: VirtioDevice, options: Mapping[str, object]) -> None:
        """Check the options. Raises InvalidError."""
        self.options = msgspec.convert(dict(options), NetOptions, strict=False)
        self.card = Card(device)
        self.tap: Tap | None = None
        name = self.options.ifname
        self._ifname = check_name(name) if name else interface_name(device.name)
        address = self.options.address
        self._address = parse_address(address) if address else None
        self._out_errors = 0

    async def run(self, started: Callable[[str], None]) -> None:
        """Bring the interface up and move frames.

        Raises PermissionDeniedError where no TAP may be made.
        """
        card = self.card
        await card.start(offload=self.options.offload, packed=self.options.packed)
        await trio.to_thread.run_sync(have_tun)
        with Tap(self._ifname, offload=card.offloads) as self.tap:
            self.tap.configure(
                mac=card.mac,
                mtu=self.options.mtu or card.mtu,
                address=self._address,
                up=True,
            )
            self.tap.set_carrier(card.link)
            started(f"{self.tap.name}, {card.mac}")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, self.tap, nursery)
                nursery.start_soon(self._receive, self.tap)
                nursery.start_soon(self._transmit, self.tap)

    async def _watch(self, tap: Tap, nursery: trio.Nursery) -> None:
        async def link_changed() -> None:
            await self.card.read_config()
            tap.set_carrier(self.card.link)

        await self.card.device.watch(lambda: nursery.start_soon(link_changed))

    async def _receive(self, tap: Tap) -> None:
        while True:
            for frame in await self.card.receive():
                try:
                    os.writev(tap.fileno(), frame)
                except OSError:  # a frame it does not take, or the interface is down
                    self._out_errors += 1
            self.card.done()
            await trio.lowlevel.checkpoint()

    async def _transmit(self, tap: Tap) -> None:
        scratch = bytearray(MAX_FRAME)
        frames = memoryview(scratch)
        while True:
            taken = 0
            while taken < _TURN and not self.card.full:
                try:
                    size = os.readv(tap.fileno(), [scratch])
                except BlockingIOError:
                    break
                self.card.send(frames[:size])
                taken += 1
            if taken:
                self.card.flush()
                await trio.lowlevel.checkpoint()
            elif self.card.full:
                await self.card.room()
            else:
                await tap.wait()

    def statistics(self) -> NetDriverStatistics:
        """A snapshot of the counters."""
        card = self.card
        return NetDriverStatistics(
            ifname=self.tap.name if self.tap else "",
            mac=str(card.mac),
            features=card.device.features,
            link=card.link,
            out_errors=self._out_errors,
            frames=card.statistics(),
        )
