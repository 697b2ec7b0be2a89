"""A driver of a virtio-net device, and a backend that remembers."""

import struct

from backends.virtio.constants import Ring, bits
from backends.virtio.net import VirtioNet
from backends.virtio.netheader import HEADER
from tests.backends.virtio.rig import Request, Rig
from tests.frames import (
    MAC_A,
    MAC_B,
)
from vbus.errors import ExistsError
from vbus.net import FrameBatch, MacAddress

PLAIN = bits(Ring.PACKED)
OK, ERR = b"\0", b"\1"
A, B = MacAddress(MAC_A), MacAddress(MAC_B)
C = MacAddress.parse("02:00:00:00:00:0c")
NONE = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
RX, MAC, VLAN, ANNOUNCE, MQ = range(5)
Frame = tuple[bytes, int, int, int, int, int]


class Wire:
    """A backend that remembers."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.taken: set[bytes] = set()
        self.macs: list[MacAddress] = []

    def forward(self, batch: FrameBatch) -> None:
        self.frames += [batch.frame(n) for n in range(len(batch))]

    def set_mac(self, mac: MacAddress) -> None:
        if mac in self.taken:
            raise ExistsError(str(mac))
        self.macs.append(mac)


def deliver(net: VirtioNet, *frames: Frame | bytes) -> None:
    batch = FrameBatch()
    plain = [f if isinstance(f, tuple) else (f, 0, 0, 0, 0, 0) for f in frames]
    batch.load(plain)
    net.deliver(batch, 0, len(batch))
    net.flush()


def post(rig: Rig, count: int, room: int, queue: int = 0) -> list[Request]:
    return [rig.add(queue, room=room) for _ in range(count)]


def received(rig: Rig, queue: int = 0, size: int = 12) -> list[tuple[bytes, bytes]]:
    """Header and frame of what has arrived, mergeable buffers put together."""
    out = []
    done = rig.collect(queue)
    while done:
        data = rig.data(done.pop(0))
        merged = struct.unpack_from("<H", data, 10)[0] if size == 12 else 1
        for _ in range(merged - 1):
            data += rig.data(done.pop(0))
        out.append((data[:size], data[size:]))
    return out


async def control(rig: Rig, kind: int, command: int, data: bytes = b"") -> bytes:
    index = len(rig.device.queues) - 1
    return await rig.request(index, bytes([kind, command]) + data, 1)


def offered(kind: int, size: int, at: int, frame: bytes, flags: int = 1) -> bytes:
    return HEADER.pack(flags, kind, at + 20, size, at, 16, 0) + frame
