"""virtio-pci modern where 32-bit memory is divided into segments with owners."""

from vbus.compare.firmware import LOW_MEMORY, Bar, Placement
from vbus.compare.layouts.ports import ModernPorts
from vbus.compare.pci import Topology
from vbus.compare.platforms import Platform
from vbus.compare.segments import SegmentedSpace
from vbus.compare.space import Space

_START, _SIZE = 0xC000_0000, 1 << 30


class Segmented(ModernPorts):
    """Each device is a group of its own, so each takes a segment of 8 MiB at least."""

    name = "segmented"
    title = "segmented MMIO, a group per device"
    about = "1 GiB in 128 segments; BARs of different groups never share one"
    rows = "R51 R52"

    def place(self, topology: Topology, platform: Platform) -> Placement:
        segmented = SegmentedSpace("MMIO", _START, _SIZE)
        low = Space(LOW_MEMORY, _START, _START + _SIZE)
        placement = Placement((low,))
        for _, function in topology.functions():
            if not function.group:
                continue
            for bar in sorted(function.bars, key=lambda bar: -bar.size):
                taken = segmented.take(bar.size, function.group, function.name)
                placement.bars.append(Bar(function.name, bar.kind, taken))
        for run in segmented.owners:
            low.place(
                _START + run.start * segmented.segment,
                run.size * segmented.segment,
                run.owner,
            )
        return placement
