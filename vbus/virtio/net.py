"""The numbers of virtio-net (virtio 1.2, 5.1)."""

import struct
from enum import IntEnum
from typing import Final

HEADER: Final = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""
NEEDS_CSUM: Final = 1
LINK_UP: Final = 1


class Feature(IntEnum):
    """Bit numbers (5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_RX_EXTRA = 20
    MQ = 22
    CTRL_MAC_ADDR = 23
    HOST_USO = 56


class Gso(IntEnum):
    """Types of segmentation on the wire."""

    NONE = 0
    TCP4 = 1
    TCP6 = 4
    UDP_L4 = 5
    ECN = 0x80
