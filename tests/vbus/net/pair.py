"""Both ends of a venet connection in one process, over one memory file."""

import os
from dataclasses import dataclass

from ioq import Ring, ring_size
from shm import AddressSpace, Doorbell, Locality, View, create_memfd
from vbus.net import GuestEnd, GuestPump, GuestRings, HostEnd, Tap

BASE = 0x4000_0000
SIZE = 4 << 20
RINGS = ("tx", "rx", "events", "pages")
SHARED_POOLS = ("tx_pool", "rx_pool", "event_pool")


@dataclass(frozen=True)
class Format:
    """What is negotiated."""

    sg: bool = True
    pmtd: bool = True
    txc: bool = True
    l4ro: bool = True
    count: int = 16
    page_size: int = 4096
    pages: int = 64
    mtu: int = 1500
    arena: int = 1 << 18


class Pair:
    """`guest` and `host` are connected; doorbells count what crosses."""

    def __init__(self, form: Format | None = None) -> None:
        self.form = form or Format()
        self.fd = create_memfd("pair", SIZE)
        self.north, self.south = AddressSpace(), AddressSpace()
        for space in (self.north, self.south):
            space.map(BASE, SIZE, self.fd)
        self._free = BASE
        self.to_guest = {name: Doorbell() for name in RINGS}
        self.to_host = {name: Doorbell() for name in RINGS}
        self.places = self._layout()
        self.rings: dict[str, Ring] = {}
        self.views: dict[str, View] = {}
        self.host_rings: dict[str, Ring] = {}
        self._make()

    def _allocate(self, size: int) -> tuple[int, int]:
        at = self._free
        self._free = -(-(at + size) // 4096) * 4096
        return at, size

    def _layout(self) -> dict[str, tuple[int, int]]:
        form, count = self.form, self.form.count
        sizes = {"tx": ring_size(count), "rx": ring_size(count)}
        sizes |= {"arena": form.arena, "buffers": (form.mtu + 14) * count}
        if form.txc:
            sizes |= {"events": ring_size(count), "event_pool": 24 * count}
        if form.sg:
            sizes["tx_pool"] = 320 * count
        if form.l4ro:
            sizes |= {"rx_pool": 320 * count, "pages": ring_size(form.pages)}
            sizes["page_memory"] = form.page_size * form.pages
        return {name: self._allocate(size) for name, size in sizes.items()}

    def _make(self) -> None:
        form = self.form
        self.guest = GuestEnd(form.pmtd, form.txc, form.page_size)
        self.host = HostEnd(form.mtu, 10)
        caps = 0x0F if form.sg else 0
        self.host.configure(
            caps | (0x20 if form.pmtd else 0),
            0x0F if form.l4ro else 0,
            form.txc,
            form.txc,
        )
        for name, place in self.places.items():
            view = self.views[name] = self.north.view(*place)
            if name in RINGS:
                count = form.pages if name == "pages" else form.count
                Ring.format(view, count)
                self._attach_ring(name, view, place)
            else:
                self.guest.attach(name, view)
                if name in SHARED_POOLS:
                    self.host.attach(name, self.south.view(*place))
        self.pump = GuestPump(self.guest, self._guest_rings(), txc=form.txc)
        self.pump.post()
        self.host.set_up(True)

    def _attach_ring(self, name: str, view: View, place: tuple[int, int]) -> None:
        bell = self.to_host[name].ring
        ring = self.rings[name] = Ring(view, self.north, Locality.NORTH, bell)
        self.guest.attach(name, ring)
        other = self.south.view(*place)
        bell = self.to_guest[name].ring
        self.host_rings[name] = Ring(other, self.south, Locality.SOUTH, bell)
        self.host.attach(name, self.host_rings[name])

    def _guest_rings(self) -> GuestRings:
        rings, bells = self.rings, self.to_guest
        return GuestRings(
            rings["tx"],
            rings["rx"],
            bells["tx"],
            bells["rx"],
            rings.get("events"),
            bells["events"] if "events" in rings else None,
            rings.get("pages"),
        )

    def ring_guest(self, bells: int) -> None:
        """Ring what the host end asks for."""
        for bit, name in ((1, "rx"), (2, "tx"), (4, "events")):
            if bells & bit:
                self.to_guest[name].ring()

    def close(self) -> None:
        for bell in (*self.to_guest.values(), *self.to_host.values()):
            bell.close()
        for view in self.views.values():
            view.close()
        self.north.close()
        self.south.close()
        os.close(self.fd)


__all__ = ["Format", "Pair", "Tap"]
