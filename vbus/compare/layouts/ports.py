"""virtio-pci, a function per device, each behind a root port of its own.

That is what PCI Express hot plug needs: a port per device. A port is a bridge: it takes
a bus number and windows. Ports are functions 0 to 7 of the root bus's slots.
"""

from typing import ClassVar

from vbus.compare.layouts.base import Layout
from vbus.compare.layouts.virtio import LEGACY_BAR, MODERN_BARS, MSIX_BAR, virtio
from vbus.compare.pci import (
    FUNCTIONS,
    BarShape,
    Function,
    Topology,
    Windows,
)


class Ports(Layout):
    """Functions of one shape, each alone on the bus behind its port."""

    bars: ClassVar[tuple[BarShape, ...]]
    windows: ClassVar[Windows] = Windows(hot_plug=True)
    hot_plug = "PCI Express: one port per device that may come"

    def plan(self, topology: Topology, devices: int) -> None:
        device = -1
        for number in range(devices):
            port = Function(f"port {number}", (MSIX_BAR,), (1,), f"port {number}")
            if number % FUNCTIONS == 0:
                device = topology.root.free_device(port)
            bus = topology.bridge(topology.root, port, device, number % FUNCTIONS)
            bus.windows = self.windows
            bus.express = True
            bus.put(virtio(number, self.bars, port.group), 0)


class ModernPorts(Ports):
    """No ports of the I/O kind, so no I/O windows."""

    name = "virtio-modern-ports"
    title = "virtio-pci modern behind root ports"
    about = "a function and a PCI Express port per device, memory BARs only"
    rows = "R14 R24 R31"
    doorbell = "mmio_exit"
    bars = MODERN_BARS


class TransitionalPorts(Ports):
    """Every port claims an I/O window of 4 KiB for 32 bytes of it."""

    name = "virtio-transitional-ports"
    title = "virtio-pci transitional behind root ports"
    about = "a function and a port per device, each with an I/O window of 4 KiB"
    rows = "R14 R20 R31"
    doorbell = "pio_exit"
    bars = (LEGACY_BAR, *MODERN_BARS)


class NarrowWindows(TransitionalPorts):
    """Ports whose capability says that their I/O window is finer."""

    name = "narrow-windows"
    title = "transitional behind ports with narrow I/O windows"
    about = "a capability lets a port claim 64 bytes of I/O instead of 4 KiB"
    rows = "R32"
    windows = Windows(io=64, hot_plug=True)


class NoWindows(TransitionalPorts):
    """Ports that watch configuration cycles to learn what is behind them."""

    name = "no-windows"
    title = "transitional behind ports without windows"
    about = "ports snoop configuration and keep a map of the BARs behind them"
    rows = "R32"
    windows = Windows(io=None)
