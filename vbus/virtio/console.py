"""The numbers of virtio-console (virtio 1.2, 5.3)."""

import struct
from enum import IntEnum
from typing import Final

MESSAGE: Final = struct.Struct("<IHH")
"""A control message: port, event, value; a name or a size may follow."""
CONTROL_IN: Final = 2
CONTROL_OUT: Final = 3


class Feature(IntEnum):
    """Bit numbers (5.3.3)."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2


class Event(IntEnum):
    """Control messages (5.3.6.2)."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7
