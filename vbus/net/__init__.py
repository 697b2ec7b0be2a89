"""Ethernet frames in batches: between rings of venet and TAP devices."""

from vbus.net._core import BATCH, FrameBatch, GuestEnd, HostEnd, TapEnd
from vbus.net.guest import GuestPump, GuestRings, GuestStatistics
from vbus.net.mac import MacAddress
from vbus.net.tap import Tap, TapStatistics
from vbus.net.watch import Direction, FrameWatcher, FrameWatchers

__all__ = [
    "BATCH",
    "Direction",
    "FrameBatch",
    "FrameWatcher",
    "FrameWatchers",
    "GuestEnd",
    "GuestPump",
    "GuestRings",
    "GuestStatistics",
    "HostEnd",
    "MacAddress",
    "Tap",
    "TapEnd",
    "TapStatistics",
]
