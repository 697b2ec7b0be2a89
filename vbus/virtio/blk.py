"""The numbers of virtio-blk (virtio 1.2, 5.2)."""

import struct
from enum import IntEnum
from typing import Final

SECTOR: Final = 512
ID_SIZE: Final = 20
HEADER: Final = struct.Struct("<IIQ")
"""Before a request: type, reserved, sector."""
RANGE: Final = struct.Struct("<QII")
"""What DISCARD and WRITE_ZEROES carry: sector, sectors, flags."""
UNMAP: Final = 1
"""The flag of WRITE_ZEROES: holes will do."""


class Feature(IntEnum):
    """Bit numbers (5.2.3)."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


class Request(IntEnum):
    """Request types (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Answer(IntEnum):
    """The status byte."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
