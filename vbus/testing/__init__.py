"""For tests of devices and of the bus: part of the product, used by its own tests.

    async def test_my_device_conforms() -> None:
        await check_device(MyDevice)

`RecordedBridge` is a bus with the bridge of one guest in this process, `GuestPeer` the
driver of that guest, and `check_device` puts a device through what guests do to it,
hostile ones included. `vbus.testing.fixtures` is a pytest plugin with all of them.
"""

from vbus.testing.bridge import RecordedBridge
from vbus.testing.conformance import check_device
from vbus.testing.effects import NurseryEffects, RecordedEffects
from vbus.testing.peer import GuestPeer, NorthRing, Shared, now

__all__ = [
    "GuestPeer",
    "NorthRing",
    "NurseryEffects",
    "RecordedBridge",
    "RecordedEffects",
    "Shared",
    "check_device",
    "now",
]
