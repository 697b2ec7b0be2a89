"""The guest's side of the bus: attach to a bridge, drive the devices behind it.

async with attach("/run/vbus/guests/g1.sock") as bridge:
    device = await bridge.device("echo0")
    async with device.opened():
        result, data = await device.call(0, b"hello")
"""

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy
from proxy.guest import attach
from proxy.memory import DmaBuffer, DmaMemory
from proxy.registry import Driver, DriverHost

__all__ = [
    "BridgeDriver",
    "DeviceProxy",
    "DmaBuffer",
    "DmaMemory",
    "Driver",
    "DriverHost",
    "attach",
]
