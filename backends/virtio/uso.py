"""Cut a UDP frame of a driver into datagrams (HOST_USO): the switch knows only TCP's.

Headers are parsed from the frame's own bytes; nothing in the driver's header but the
segment size is believed.
"""

import struct
from typing import Final

from vbus.errors import InvalidError

Frame = tuple[bytes, int, int, int, int, int]

_NEEDS_CSUM: Final = 1
_TAGS: Final = (0x8100, 0x88A8)
_EXTENSIONS: Final = (0, 43, 60)
_UDP: Final = 17
_MOST: Final = 1024


def _sum(data: bytes) -> int:
    """The folded ones' complement sum of 16-bit words."""
    total = int.from_bytes(data + b"\0" * (len(data) & 1), "big")
    return total % 0xFFFF or (0xFFFF if total else 0)


def _find_udp(frame: bytes) -> tuple[int, int]:
    """Offsets of the IP header and of UDP. Raises struct.error, InvalidError."""
    at = 12
    (kind,) = struct.unpack_from(">H", frame, at)
    while kind in _TAGS:
        at += 4
        (kind,) = struct.unpack_from(">H", frame, at)
    ip = at + 2
    if kind == 0x0800:
        (first,) = struct.unpack_from("B", frame, ip)
        (fragment,) = struct.unpack_from(">H", frame, ip + 6)
        protocol, udp = frame[ip + 9], ip + (first & 15) * 4
        if first >> 4 != 4 or udp < ip + 20 or fragment & 0x3FFF:
            raise InvalidError("not a whole IPv4 packet")
    elif kind == 0x86DD:
        protocol, udp = struct.unpack_from("B", frame, ip + 6)[0], ip + 40
        while protocol in _EXTENSIONS:
            protocol, length = struct.unpack_from("BB", frame, udp)
            udp += 8 * (length + 1)
    else:
        raise InvalidError(f"Ethernet type {kind:#x} has no UDP")
    if protocol != _UDP or udp + 8 > len(frame):
        raise InvalidError("not UDP")
    return ip, udp


def _headers(head: bytearray, ip: int, udp: int, size: int, number: int) -> None:
    """Make the headers those of datagram `number`, with `size` bytes of payload."""
    length = 8 + size
    if head[ip] >> 4 == 4:
        (ident,) = struct.unpack_from(">H", head, ip + 4)
        struct.pack_into(
            ">HH", head, ip + 2, udp - ip + length, ident + number & 0xFFFF
        )
        struct.pack_into(">H", head, ip + 10, 0)
        struct.pack_into(">H", head, ip + 10, ~_sum(bytes(head[ip:udp])) & 0xFFFF)
        addresses = bytes(head[ip + 12 : ip + 20])
    else:
        struct.pack_into(">H", head, ip + 4, udp - ip - 40 + length)
        addresses = bytes(head[ip + 8 : ip + 40])
    pseudo = _sum(addresses + struct.pack(">II", length, _UDP))
    struct.pack_into(">HH", head, udp + 4, length, pseudo)


def segment(frame: bytes, size: int) -> list[Frame]:
    """Give the datagrams, each of which still needs its checksum.

    Raises InvalidError: no UDP in it, or too many segments.
    """
    try:
        ip, udp = _find_udp(frame)
    except (struct.error, IndexError):
        raise InvalidError("the frame ends within its headers") from None
    payload = frame[udp + 8 :]
    if size == 0 or len(payload) > size * _MOST:
        raise InvalidError(f"{len(payload)} bytes cannot be cut into pieces of {size}")
    out: list[Frame] = []
    for number, at in enumerate(range(0, max(len(payload), 1), size)):
        piece = payload[at : at + size]
        head = bytearray(frame[: udp + 8])
        _headers(head, ip, udp, len(piece), number)
        out.append((bytes(head) + piece, _NEEDS_CSUM, 0, 0, udp, 6))
    return out
