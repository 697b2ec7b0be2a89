"""A user-space device bus for guests. What a device author needs, at one place.

    from vbus import Connection, Device, attribute, call, main

Imported on first use only, so that a guest which needs `vbus.abi` gets no more.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vbus.device import (
        CallResult,
        Connection,
        Device,
        Ended,
        Host,
        SharedMemory,
        attribute,
        call,
        main,
    )

__all__ = [
    "CallResult",
    "Connection",
    "Device",
    "Ended",
    "Host",
    "SharedMemory",
    "attribute",
    "call",
    "main",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("vbus.device"), name)
    raise AttributeError(f"module 'vbus' has no attribute {name!r}")
