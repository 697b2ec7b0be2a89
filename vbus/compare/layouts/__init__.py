"""The layouts, one small class each, and what laying one out gives."""

from vbus.compare.layouts.base import Laid, Layout, lay_out
from vbus.compare.layouts.bridge import VbusBridge
from vbus.compare.layouts.conventional import Modern, Transitional
from vbus.compare.layouts.ports import (
    ModernPorts,
    NarrowWindows,
    NoWindows,
    TransitionalPorts,
)
from vbus.compare.layouts.proposals import (
    FourBar,
    Mirrored,
    OffsetsByCapability,
    OffsetsByTable,
)
from vbus.compare.layouts.root import RootDevice
from vbus.compare.layouts.segmented import Segmented

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        VbusBridge(),
        RootDevice(),
        Modern(),
        Transitional(),
        ModernPorts(),
        TransitionalPorts(),
        NarrowWindows(),
        NoWindows(),
        FourBar(),
        Mirrored(),
        OffsetsByCapability(),
        OffsetsByTable(),
        Segmented(),
    )
}

__all__ = ["LAYOUTS", "Laid", "Layout", "lay_out"]
