"""One virtio-net function: its BARs as QEMU shows them, its vectors as Linux asks."""

from vbus.compare.pci import BarShape, Function, Kind
from vbus.compare.registers import NET_CONFIG, legacy_bar

PAGE = 4096
MSIX_BAR = BarShape(Kind.MEMORY, PAGE)
# Four parts of a page each: common, ISR, device config, notify.
MODERN_REGION = BarShape(Kind.PREFETCHABLE, 4 * PAGE, wide=True)
MODERN_BARS = (MSIX_BAR, MODERN_REGION)
LEGACY_BAR = BarShape(Kind.IO, legacy_bar(NET_CONFIG))
# Config changes and the two queues; if that is too much, both queues on one.
VECTORS = (3, 2)
# Descriptors, available and used ring of 256 entries each: three pages a queue.
QUEUES, PAGES_PER_QUEUE = 2, 3


def virtio(number: int, bars: tuple[BarShape, ...], group: str) -> Function:
    """Make the function of the device `number`."""
    return Function(f"virtio {number}", bars, VECTORS, group)
