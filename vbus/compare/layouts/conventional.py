"""virtio-pci, a function per device, in conventional slots.

Devices lie in the slots of the root bus; beyond its 28 or so free ones, conventional
bridges add buses of 32 slots, as few as do and each as near to the root as it can be.
"""

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

from vbus.compare.layouts.base import Layout
from vbus.compare.layouts.virtio import LEGACY_BAR, MODERN_BARS, virtio
from vbus.compare.pci import BUSES, DEVICES, BarShape, Bus, Function, Topology
from vbus.compare.space import ExhaustedError


class Conventional(Layout):
    """Functions of one shape in conventional slots, in bridges where they must."""

    bars: ClassVar[tuple[BarShape, ...]]
    hot_plug = "a slot that has a hot-plug controller: ACPI or SHPC"

    def plan(self, topology: Topology, devices: int) -> None:
        room = _room(topology.root)
        bridges = 0
        while room + bridges * (DEVICES - 1) < devices:
            bridges += 1
            if bridges >= BUSES:
                raise ExhaustedError("bus numbers", f"{bridges} bridges, 256 buses")
        slots = _slots(topology, bridges)
        for number, (bus, device) in enumerate(islice(slots, devices)):
            group = f"slot {device}" if bus.parent is None else _top(bus)
            bus.put(virtio(number, self.bars, group), device)


def _room(bus: Bus) -> int:
    return DEVICES - len({device for device, _ in bus.slots})


def _slots(topology: Topology, bridges: int) -> Iterator[tuple[Bus, int]]:
    """Put in the bridges, then give every slot that is left."""
    for number in range(bridges):
        bus = next(bus for bus in topology.buses if _room(bus))
        bridge = Function(f"bridge {number}", group="")
        device = bus.free_device(bridge)
        bridge.group = f"bridge {number}" if bus.parent is None else _top(bus)
        topology.bridge(bus, bridge, device)
    for bus in topology.buses:
        taken = {device for device, _ in bus.slots}
        for device in range(DEVICES):
            if device not in taken:
                yield bus, device


def _top(bus: Bus) -> str:
    """Behind a conventional bridge all requests look like the bridge's own."""
    assert bus.bridge is not None
    return bus.bridge.group


class Modern(Conventional):
    """virtio 1.x without legacy registers."""

    name = "virtio-modern"
    title = "virtio-pci modern, conventional slots"
    about = "a function per device, memory BARs only"
    rows = "R14 R24"
    doorbell = "mmio_exit"
    bars = MODERN_BARS


class Transitional(Conventional):
    """virtio 1.x with the legacy registers in a port BAR."""

    name = "virtio-transitional"
    title = "virtio-pci transitional, conventional slots"
    about = "a function per device, with the legacy port BAR"
    rows = "R14 R20"
    doorbell = "pio_exit"
    bars = (LEGACY_BAR, *MODERN_BARS)
