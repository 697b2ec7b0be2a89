"""The numbers of virtio 1.2 that every model needs, and what our rings can do."""

from typing import Final

from vbus.virtio.common import QUEUE_SIZE_LIMIT, DeviceId, Ring, Status, bits

LEGACY_MASK: Final = 0xFFFF_FFFF
"""Features that a legacy driver can see."""

RING_FEATURES: Final = bits(
    Ring.ANY_LAYOUT,
    Ring.INDIRECT_DESC,
    Ring.EVENT_IDX,
    Ring.VERSION_1,
    Ring.PACKED,
    Ring.ORDER_PLATFORM,
    Ring.RESET,
)
"""What our rings can do. ACCESS_PLATFORM is the transport's to add."""

__all__ = [
    "LEGACY_MASK",
    "QUEUE_SIZE_LIMIT",
    "RING_FEATURES",
    "DeviceId",
    "Ring",
    "Status",
    "bits",
]
