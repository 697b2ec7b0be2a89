"""A root virtio device with child devices behind it: the bridge's idea, in virtio."""

from vbus.compare.layouts.base import Layout
from vbus.compare.layouts.virtio import MSIX_BAR, PAGE, QUEUES
from vbus.compare.pci import BarShape, Function, Kind, Topology
from vbus.compare.space import Space, power_of_two

_NOTIFY_BYTES = 4
_OWN_QUEUES = 1
_OTHER_PARTS = 3 * PAGE


class RootDevice(Layout):
    """One function; each child's queues have addresses in its notify region.

    The root's probe discovers the children; one virtqueue carries their events, so one
    vector serves all, beside that for config changes.
    """

    name = "root-virtio"
    title = "root virtio device with children"
    about = (
        "one function; children are found by its probe, a virtqueue has their events"
    )
    rows = "R14"
    doorbell = "mmio_exit"
    hot_plug = "an event in the root's virtqueue"

    def plan(self, topology: Topology, devices: int) -> None:
        # Queues are selected by 16 bits, for the whole function.
        queues = Space("queue numbers", 0, 1 << 16)
        queues.take(_OWN_QUEUES, 1, "root")
        for number in range(devices):
            queues.take(QUEUES, 1, f"child {number}")
        size = power_of_two(_OTHER_PARTS + max(PAGE, queues.used * _NOTIFY_BYTES))
        region = BarShape(Kind.PREFETCHABLE, size, wide=True)
        root = Function("root", (MSIX_BAR, region), (2, 1), "root")
        topology.root.put(root, topology.root.free_device(root))
