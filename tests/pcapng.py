"""Reading pcapng for tests: strict, small, and independent of how we write it."""

import struct
from dataclasses import dataclass, field


@dataclass
class Interface:
    """What the file says of an interface."""

    name: str
    description: str
    snaplen: int
    received: int | None = None
    dropped: int | None = None


@dataclass
class Packet:
    """A captured frame."""

    interface: str
    time_ns: int
    data: bytes
    length: int
    direction: int
    dropped: int
    comment: str


@dataclass
class Capture:
    """A whole file."""

    interfaces: list[Interface] = field(default_factory=list)
    packets: list[Packet] = field(default_factory=list)


def read(data: bytes) -> Capture:
    """Read a section; anything that is not as the format says is an error."""
    found = Capture()
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        assert size % 4 == 0
        assert struct.unpack_from("<I", data, at + size - 4) == (size,)
        body = data[at + 8 : at + size - 4]
        if at == 0:
            assert kind == 0x0A0D0D0A
            assert struct.unpack_from("<IHHq", body) == (0x1A2B3C4D, 1, 0, -1)
        elif kind == 1:
            link, zero, snaplen = struct.unpack_from("<HHI", body)
            assert (link, zero) == (1, 0)
            options = _options(body[8:])
            assert options[9] == b"\x09"
            name, about = options[2].decode(), options[3].decode()
            found.interfaces.append(Interface(name, about, snaplen))
        elif kind == 5:
            number, _, _ = struct.unpack_from("<III", body)
            options = _options(body[12:])
            interface = found.interfaces[number]
            (interface.received,) = struct.unpack("<Q", options[4])
            (interface.dropped,) = struct.unpack("<Q", options[5])
        else:
            assert kind == 6
            found.packets.append(_packet(found, body))
        at += size
    assert at == len(data)
    return found


def _packet(found: Capture, body: bytes) -> Packet:
    number, high, low, captured, length = struct.unpack_from("<IIIII", body)
    end = 20 + captured
    options = _options(body[end + -end % 4 :])
    return Packet(
        found.interfaces[number].name,
        high << 32 | low,
        body[20:end],
        length,
        struct.unpack("<I", options.get(2, bytes(4)))[0],
        struct.unpack("<Q", options.get(4, bytes(8)))[0],
        options.get(1, b"").decode(),
    )


def _options(data: bytes) -> dict[int, bytes]:
    options = {}
    while data:
        code, size = struct.unpack_from("<HH", data)
        if code == 0:
            assert data == bytes(4)
            break
        options[code] = data[4 : 4 + size]
        data = data[4 + size + -size % 4 :]
    return options
