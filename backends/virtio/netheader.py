"""struct virtio_net_hdr, and what the features say about it (virtio 1.2, 5.1.6).

Frames here are tuples as in `vbus.net.FrameBatch.load`.
"""

import struct
from typing import Final

from backends.virtio.features import Dependencies
from backends.virtio.uso import Frame, segment
from vbus.errors import InvalidError
from vbus.virtio.net import HEADER, NEEDS_CSUM, Feature, Gso

LEGACY_SIZE: Final = 10
MAX_FRAME: Final = 65536 + 18

_GSO, _ECN = 2, 4
_TCP4, _TCP6 = 0, 2


DEPENDENCIES: Final[Dependencies] = {
    Feature.GUEST_TSO4: (Feature.GUEST_CSUM,),
    Feature.GUEST_TSO6: (Feature.GUEST_CSUM,),
    Feature.GUEST_ECN: (Feature.GUEST_TSO4, Feature.GUEST_TSO6),
    Feature.HOST_TSO4: (Feature.CSUM,),
    Feature.HOST_TSO6: (Feature.CSUM,),
    Feature.HOST_ECN: (Feature.HOST_TSO4, Feature.HOST_TSO6),
    Feature.HOST_USO: (Feature.CSUM,),
    Feature.CTRL_RX: (Feature.CTRL_VQ,),
    Feature.CTRL_RX_EXTRA: (Feature.CTRL_VQ,),
    Feature.MQ: (Feature.CTRL_VQ,),
    Feature.CTRL_MAC_ADDR: (Feature.CTRL_VQ,),
}
"""5.1.3.1."""


_SENDS: Final = {
    Gso.TCP4: (Feature.HOST_TSO4, _TCP4),
    Gso.TCP6: (Feature.HOST_TSO6, _TCP6),
}


def _has(features: int, bit: int) -> bool:
    return bool(features >> bit & 1)


def from_driver(data: bytes, header_size: int, features: int) -> list[Frame]:
    """Take apart what a driver sends. Raises InvalidError.

    Whatever the header asks for must have been negotiated; the frame itself is checked
    against it by FrameBatch.
    """
    if len(data) < header_size + 14:
        raise InvalidError(f"{len(data)} bytes are no header and frame")
    flags, kind, _, gso_size, start, offset = struct.unpack_from("<BBHHHH", data)
    frame = data[header_size:]
    ecn, kind = kind & Gso.ECN, kind & ~Gso.ECN
    checksum = bool(flags & NEEDS_CSUM)
    if checksum and not _has(features, Feature.CSUM):
        raise InvalidError("checksum offload was not negotiated")
    if kind == Gso.NONE:
        return [(frame, NEEDS_CSUM * checksum, 0, 0, start, offset)]
    if not checksum or (ecn and not _has(features, Feature.HOST_ECN)):
        raise InvalidError("segmentation without checksum, or ECN not negotiated")
    if kind == Gso.UDP_L4 and _has(features, Feature.HOST_USO):
        return segment(frame, gso_size)
    needed, code = _SENDS.get(Gso(kind) if kind in _SENDS else Gso.NONE, (None, 0))
    if needed is None or not _has(features, needed):
        raise InvalidError(f"segmentation of type {kind} was not negotiated")
    bits = NEEDS_CSUM | _GSO | (_ECN if ecn else 0)
    return [(frame, bits, code, gso_size, start, offset)]


def takes(frame: Frame, features: int) -> bool:
    """Can a driver with these features take the frame as it is?"""
    _, flags, kind, *_ = frame
    if flags & NEEDS_CSUM and not _has(features, Feature.GUEST_CSUM):
        return False
    if not flags & _GSO:
        return True
    if flags & _ECN and not _has(features, Feature.GUEST_ECN):
        return False
    needed = Feature.GUEST_TSO6 if kind == _TCP6 else Feature.GUEST_TSO4
    return _has(features, needed)


def to_driver(frame: Frame, header_size: int, buffers: int) -> bytes:
    """Make the header before a frame that the driver `takes`."""
    data, flags, kind, gso_size, start, offset = frame
    checksum = flags & NEEDS_CSUM
    gso, length = int(Gso.NONE), 0
    if flags & _GSO:
        gso = Gso.TCP6 if kind == _TCP6 else Gso.TCP4
        gso |= Gso.ECN if flags & _ECN else 0
        length = start + (data[start + 12] >> 4) * 4  # FrameBatch found the TCP header
    fields = HEADER.pack(
        checksum, gso, length, gso_size, start * checksum, offset * checksum, buffers
    )
    return fields[:header_size]
