"""virtio-net from the driver's side: frames with their headers (virtio 1.2, 5.1).

A frame here is bytes with struct virtio_net_hdr before it, as a TAP of the kernel reads
and writes them; nothing looks into it. So whatever the kernel leaves to the last one to
do (checksums, segmentation) is left to the device, and the other way round.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proxy.virtio.device import VirtioDevice
from proxy.virtio.queue import Virtqueue
from shm import View
from vbus.net import MacAddress
from vbus.virtio.common import bits
from vbus.virtio.net import HEADER, LINK_UP, Feature

PLAIN: Final = bits(Feature.MAC, Feature.MTU, Feature.STATUS, Feature.MRG_RXBUF)
OFFLOADS: Final = bits(
    Feature.CSUM,
    Feature.GUEST_CSUM,
    Feature.HOST_TSO4,
    Feature.HOST_TSO6,
    Feature.HOST_ECN,
    Feature.GUEST_TSO4,
    Feature.GUEST_TSO6,
    Feature.GUEST_ECN,
)
TAP_OFFLOADS: Final = bits(
    Feature.CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_ECN
)
"""What a TAP leaves to us when it is asked to."""
MAX_FRAME: Final = HEADER.size + 65536 + 18
_CONFIG: Final = struct.Struct("<6sHHH")
_QUEUE_SIZE: Final = 256
_RX_SLOT: Final = 16 << 10
_SMALL: Final = 2048
_SMALL_SLOTS, _LARGE_SLOTS = 128, 24
_GROUP: Final = 16
_BUFFERS: Final = struct.Struct("<H")
_BUFFERS_AT: Final = HEADER.size - _BUFFERS.size


@dataclass(frozen=True)
class CardStatistics:
    """Frames sent (tx) and received (rx), with their headers.

    `rx_errors` had a header that does not fit what came.
    """

    tx_frames: int
    tx_bytes: int
    rx_frames: int
    rx_bytes: int
    rx_errors: int


class _Buffer:
    """One buffer in guest memory, `at` an offset into a larger piece."""

    __slots__ = ("address", "at", "size", "view")

    def __init__(self, view: View, at: int, size: int) -> None:
        self.view = view
        self.at = at
        self.size = size
        self.address = view.addr + at


class Card:
    """A network card that was brought up by `start`."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.mac = MacAddress(bytes(6))
        self.mtu = 1500
        self.link = True
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._small: list[_Buffer] = []
        self._large: list[_Buffer] = []
        self._partial: list[bytes] = []
        self._missing = 0
        self._used: list[_Buffer] = []
        self._counts = dict.fromkeys(CardStatistics.__dataclass_fields__, 0)

    async def start(self, *, offload: bool = True, packed: bool = False) -> None:
        """Bring the device up, its receive buffers posted."""
        device = self.device
        wanted = PLAIN | (OFFLOADS if offload else 0)
        await device.negotiate(wanted, packed=packed)
        await self.read_config()
        self._rx = await device.open_queue(0, _QUEUE_SIZE)
        self._tx = await device.open_queue(1, _QUEUE_SIZE)
        self._small = self._allocate(_SMALL_SLOTS, _SMALL)
        self._large = self._allocate(_LARGE_SLOTS, MAX_FRAME)
        buffers = self._allocate(self._rx.core.size, self._rx_size)
        self._rx.add([_receive_chain(each) for each in buffers])
        await device.ready()
        self._rx.kick()

    @property
    def _rx_size(self) -> int:
        """Without mergeable buffers each takes the largest frame."""
        if self.device.has(Feature.MRG_RXBUF):
            return _RX_SLOT
        return MAX_FRAME if self.device.has(Feature.GUEST_TSO4) else _SMALL

    def _allocate(self, count: int, size: int) -> list[_Buffer]:
        """Make buffers, not all in one piece, which there may not be."""
        made: list[_Buffer] = []
        size = -(-size // 64) * 64
        while len(made) < count:
            group = min(_GROUP, count - len(made))
            view = self.device.transport.allocate(group * size).view
            made += [_Buffer(view, n * size, size) for n in range(group)]
        return made

    @property
    def offloads(self) -> bool:
        """Does the device finish what a TAP leaves to us?"""
        return self.device.features & TAP_OFFLOADS == TAP_OFFLOADS

    async def read_config(self) -> None:
        """Look at address, link and MTU (again)."""
        raw = await self.device.transport.read_config(0, _CONFIG.size)
        mac, status, _, mtu = _CONFIG.unpack(raw)
        if self.device.has(Feature.MAC):
            self.mac = MacAddress(mac)
        if self.device.has(Feature.MTU):
            self.mtu = mtu
        if self.device.has(Feature.STATUS):
            self.link = bool(status & LINK_UP)

    # Receiving

    async def receive(self) -> list[list[bytes]]:
        """Wait for frames: each in pieces, header first. Hand back with `done`.

        Raises DriverQueueError, or the error once the device is gone.
        """
        assert self._rx is not None
        while True:
            frames: list[list[bytes]] = []
            for buffer, written in self._rx.collect():
                self._piece(buffer.view.read(buffer.at, written), frames)
                self._used.append(buffer)
            if self._used:
                return frames
            await self._rx.wait()

    def _piece(self, data: bytes, frames: list[list[bytes]]) -> None:
        """Put one buffer's content where it belongs."""
        if not self._missing:
            self._missing = 1
            if len(data) < HEADER.size:
                data = b""
            elif self.device.has(Feature.MRG_RXBUF):
                (self._missing,) = _BUFFERS.unpack_from(data, _BUFFERS_AT)
            if not data or not 0 < self._missing <= _QUEUE_SIZE:
                self._counts["rx_errors"] += 1
                self._missing = 0
                return
        self._partial.append(data)
        self._missing -= 1
        if not self._missing:
            self._counts["rx_frames"] += 1
            self._counts["rx_bytes"] += sum(map(len, self._partial))
            frames.append(self._partial)
            self._partial = []

    def done(self) -> None:
        """Post the buffers of the last `receive` again."""
        assert self._rx is not None
        used, self._used = self._used, []
        self._rx.add([_receive_chain(each) for each in used])
        self._rx.kick()

    # Sending

    @property
    def full(self) -> bool:
        """Has a frame of any size no room now? Takes back what was sent."""
        self._reap()
        assert self._tx is not None
        return not self._large or not self._tx.core.room

    def send(self, frame: bytes | memoryview) -> None:
        """Send a frame unless `full`; `flush` tells the device."""
        assert self._tx is not None
        small = len(frame) <= _SMALL and bool(self._small)
        buffer = (self._small if small else self._large).pop()
        buffer.view.write(buffer.at, frame)
        self._tx.add([([(buffer.address, len(frame))], (), buffer)])
        self._counts["tx_frames"] += 1
        self._counts["tx_bytes"] += len(frame)

    def flush(self) -> None:
        """Tell the device of what was sent."""
        assert self._tx is not None
        self._tx.kick()

    async def room(self) -> None:
        """Wait while `full`."""
        assert self._tx is not None
        while self.full:
            await self._tx.wait()

    def _reap(self) -> None:
        assert self._tx is not None
        for buffer, _ in self._tx.collect(_QUEUE_SIZE):
            (self._small if buffer.size == _SMALL else self._large).append(buffer)

    def statistics(self) -> CardStatistics:
        """A snapshot of the counters."""
        return CardStatistics(**self._counts)


def _receive_chain(
    buffer: _Buffer,
) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]], _Buffer]:
    return (), ((buffer.address, buffer.size),), buffer
