"""Writing pcapng: blocks as bytes, no files here.

After draft-ietf-opsawg-pcapng: section header (0x0A0D0D0A), interface description (1),
interface statistics (5), enhanced packet (6). Little-endian, times in nanoseconds.
"""

import struct
from collections.abc import Iterable

ETHERNET = 1
_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER = 0x1A2B3C4D
_UNKNOWN_LENGTH = -1
_END, _COMMENT = 0, 1
_SHB_APPLICATION = 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_EPB_FLAGS, _EPB_DROPCOUNT = 2, 4
_ISB_IFRECV, _ISB_IFDROP = 4, 5
_NANOSECONDS = b"\x09"
_TEXT_LIMIT = 0xFFFF
Option = tuple[int, bytes]


def section(application: str) -> bytes:
    """Begin a section; the first block of a file."""
    body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH)
    return _block(_SECTION, body, [(_SHB_APPLICATION, _text(application))])


def interface(name: str, description: str, snaplen: int) -> bytes:
    """Describe the next Ethernet interface; the first has number 0."""
    options = [
        (_IF_NAME, _text(name)),
        (_IF_DESCRIPTION, _text(description)),
        (_IF_TSRESOL, _NANOSECONDS),
    ]
    return _block(_INTERFACE, struct.pack("<HHI", ETHERNET, 0, snaplen), options)


def packet(
    interface: int,
    time_ns: int,
    data: bytes,
    length: int,
    *,
    direction: int = 0,
    dropped: int = 0,
    comment: str = "",
) -> bytes:
    """Make a packet of `length` bytes on the wire, of which `data` was captured.

    `dropped` counts what was lost on this interface since the packet before.
    """
    options = [(_EPB_FLAGS, struct.pack("<I", direction))] if direction else []
    if dropped:
        options.append((_EPB_DROPCOUNT, struct.pack("<Q", dropped)))
    if comment:
        options.append((_COMMENT, _text(comment)))
    head = struct.pack(
        "<IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length
    )
    return _block(_PACKET, head + _padded(data), options)


def statistics(interface: int, time_ns: int, received: int, dropped: int) -> bytes:
    """Say how many packets an interface had, and how many of them are missing."""
    head = struct.pack("<III", interface, time_ns >> 32, time_ns & 0xFFFFFFFF)
    options = [
        (_ISB_IFRECV, struct.pack("<Q", received)),
        (_ISB_IFDROP, struct.pack("<Q", dropped)),
    ]
    return _block(_STATISTICS, head, options)


def _block(kind: int, body: bytes, options: Iterable[Option]) -> bytes:
    coded = b"".join(
        struct.pack("<HH", code, len(value)) + _padded(value) for code, value in options
    )
    if coded:
        coded += struct.pack("<HH", _END, 0)
    size = 12 + len(body) + len(coded)
    return struct.pack("<II", kind, size) + body + coded + struct.pack("<I", size)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _text(text: str) -> bytes:
    return text.encode()[:_TEXT_LIMIT]
