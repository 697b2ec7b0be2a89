"""The ABI of the device type "virtio" on the bus: docs/abi.md 9.3 in numbers."""

import struct
from enum import IntEnum
from typing import Final

TYPE: Final = "virtio"
VERSION: Final = 1
CONFIG_SHM: Final = 0x10000
"""The memory whose signal tells of the configuration; a queue's has its index."""
MAX_QUEUES: Final = CONFIG_SHM
FEATURE_WORDS: Final = 4
QUEUE_ENABLED: Final = 1


class Func(IntEnum):
    """Functions of DEVCALL."""

    GETID = 0
    GETINFO = 1
    GETFEATURES = 2
    SETFEATURES = 3
    GETSTATUS = 4
    SETSTATUS = 5
    GETCONFIG = 6
    SETCONFIG = 7
    GETQUEUE = 8
    ENABLEQUEUE = 9
    RESETQUEUE = 10


INFO: Final = struct.Struct("<IIII")
"""Device id, vendor, queues, bytes of configuration."""
FEATURES: Final = struct.Struct("<II")
"""Which 32 bits; the bits."""
STATUS: Final = struct.Struct("<I")
CONFIG_HEAD: Final = struct.Struct("<II")
"""Offset; generation (out). The bytes follow."""
QUEUE: Final = struct.Struct("<IIII")
"""Index, most entries, entries, state (out: all but the index)."""
ENABLE: Final = struct.Struct("<IIIIII")
"""Index, entries, where descriptors, driver's and device's area begin in the queue's
memory; 4 bytes of zero."""
INDEX: Final = struct.Struct("<I")
