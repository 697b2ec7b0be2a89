"""The bridge of this product: one function, whatever is behind it."""

from vbus.bridge import config_space
from vbus.compare.layouts.base import Layout
from vbus.compare.pci import BarShape, Function, Kind, Topology


class VbusBridge(Layout):
    """One function; devices are names behind it, events share a ring a priority."""

    name = "vbus-bridge"
    title = "vbus bridge"
    about = "one function for all devices; they are named by strings behind it"
    rows = "R1 R6 R8 R9 R10 R41"
    doorbell = "pio_exit"
    hot_plug = "an event on the bridge's own channel"

    def plan(self, topology: Topology, devices: int) -> None:
        shown = config_space(msix=True)
        assert shown.msix is not None
        bars = tuple(
            BarShape(Kind.IO if bar.io else Kind.MEMORY, bar.size)
            for bar in shown.bars.values()
        )
        bridge = Function("bridge", bars, (shown.msix.vectors, 1), "bridge")
        topology.root.put(bridge, topology.root.free_device(bridge))
