"""virtio-net (virtio 1.2, section 5.1): frames between virtqueues and a NetBackend.

Queues: receive 0, transmit 0, receive 1, ..., and the control queue behind the last
pair, or at 2 without MQ (5.1.2). Frames cross in FrameBatches, as for venet: what the
driver cannot take as it is, is cut and finished here; with no buffer it is dropped.
Nothing waits for a driver.
"""

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import trio

from backends.virtio import netheader
from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId, Ring, bits
from backends.virtio.device import (
    Chain,
    DeviceQueue,
    LiveRing,
    MalformedError,
    VirtioDevice,
)
from backends.virtio.netcontrol import answer
from backends.virtio.netfilter import ReceiveFilter
from backends.virtio.uso import Frame
from vbus.errors import InvalidError, ProtocolError, VbusError
from vbus.net import BATCH, FrameBatch, MacAddress
from vbus.virtio.net import HEADER, LINK_UP, Feature

MAX_PAIRS: Final = 16

FIELDS: Final = (
    Field("mac", 0, "6s", changes=True, written=Written.ANY),
    Field("status", 6, "H", changes=True),
    Field("max_virtqueue_pairs", 8, "H"),
    Field("mtu", 10, "H"),
)


class NetBackend(Protocol):
    """Where a device's frames go."""

    def forward(self, batch: FrameBatch) -> None:
        """Send the driver's frames on, within this call."""
        ...

    def set_mac(self, mac: MacAddress) -> None:
        """The driver wants another address. Raises ExistsError."""
        ...


@dataclass(frozen=True)
class NetStatistics:
    """Frames from the driver (tx) and to it (rx).

    `tx_errors` asked for what was not negotiated or is no frame; `rx_dropped` found no
    buffer; `rx_filtered` were not wanted; `rx_length_errors` did not fit one buffer;
    `finished` were cut or check-summed for a driver that cannot.
    """

    tx_frames: int
    tx_bytes: int
    tx_errors: int
    rx_frames: int
    rx_bytes: int
    rx_dropped: int
    rx_filtered: int
    rx_length_errors: int
    finished: int
    commands: int
    refused_commands: int


class _Receiver:
    """A receive queue: buffers taken and not yet used, and what is filled."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.buffers: deque[Chain] = deque()
        self.filled: list[tuple[Chain, int]] = []

    def clear(self) -> None:
        self.buffers.clear()
        self.filled.clear()


class _Extra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the driver set by the control queue; modes are those that are on."""

    mac: bytes
    modes: tuple[str, ...]
    stations: tuple[bytes, ...]
    groups: tuple[bytes, ...]
    active_pairs: int


_EXTRA: Final = msgspec.msgpack.Decoder(_Extra)


class VirtioNet(VirtioDevice):
    """A network card."""

    device_id = DeviceId.NET
    dependencies = netheader.DEPENDENCIES

    def __init__(
        self,
        backend: NetBackend,
        mac: MacAddress,
        *,
        mtu: int = 1500,
        pairs: int = 1,
        queue_size: int = 256,
        offload: bool = True,
        latch: bool = False,
    ) -> None:
        """Without `offload` only plain frames cross. Raises InvalidError."""
        if not 1 <= pairs <= MAX_PAIRS:
            raise InvalidError(f"{pairs} queue pairs are not between 1 and {MAX_PAIRS}")
        if not 68 <= mtu <= 65521:
            raise InvalidError(f"an MTU of {mtu} is not between 68 and 65521")
        features = bits(*Feature)
        if not offload:
            features &= ~bits(Feature.CSUM, Feature.GUEST_CSUM)
        if pairs == 1:
            features &= ~bits(Feature.MQ)
        config = ConfigSpace(FIELDS, latch=latch)
        sizes = [queue_size] * (2 * pairs) + [64]
        super().__init__(sizes, features=features, config=config)
        self.backend = backend
        self.permanent_mac = mac
        self.filter = ReceiveFilter(mac)
        self.active_pairs = 1
        self._pairs = pairs
        self._receivers = [_Receiver(2 * n) for n in range(pairs)]
        self._touched: set[int] = set()
        self._counts = dict.fromkeys(NetStatistics.__dataclass_fields__, 0)
        self.change_config(
            mac=bytes(mac), status=LINK_UP, max_virtqueue_pairs=pairs, mtu=mtu
        )

    # Addresses, modes, link

    @property
    def mac(self) -> MacAddress:
        """The driver's address."""
        return MacAddress(self.filter.mac)

    @property
    def max_pairs(self) -> int:
        """Queue pairs that the driver may use."""
        return self._pairs if self.has(Feature.MQ) else 1

    def set_link(self, up: bool) -> None:
        """Tell the driver whether the cable is in."""
        self.change_config(status=LINK_UP if up else 0)

    def set_mac(self, mac: MacAddress) -> None:
        """Take the address the driver wants. Raises InvalidError, ExistsError."""
        if mac.is_group or mac == bytes(6):
            raise InvalidError(f"{mac} cannot be the address of one station")
        if mac != self.filter.mac:
            self.backend.set_mac(mac)
            self.filter.mac = bytes(mac)
        self.config.set("mac", bytes(mac))

    def config_written(self, name: str) -> None:
        # The legacy way to set the address; for others the field is read-only (5.1.4.2)
        # unless they have the latch. Byte by byte one passes through other addresses,
        # so what a legacy driver wrote stays, even while it is no one's address.
        value = self.config.get("mac")
        assert isinstance(value, bytes)
        by_field = self.legacy and not self.has(Feature.CTRL_MAC_ADDR)
        try:
            if not by_field and not self.config.latch:
                raise InvalidError("the address is read-only")
            self.set_mac(MacAddress(value))
        except VbusError:
            if not by_field:
                self.config.set("mac", self.filter.mac)

    def extra(self) -> bytes:
        filter = self.filter
        return msgspec.msgpack.encode(
            _Extra(
                bytes(filter.mac),
                tuple(name for name, on in filter.modes.items() if on),
                tuple(filter.stations),
                tuple(filter.groups),
                self.active_pairs,
            )
        )

    def restore_extra(self, extra: bytes) -> None:
        try:
            saved = _EXTRA.decode(extra)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"no state of a network card: {error}") from None
        if not 1 <= saved.active_pairs <= self.max_pairs:
            raise InvalidError(
                f"{saved.active_pairs} queue pairs are none to go on with"
            )
        if saved.mac != self.filter.mac:
            self.set_mac(MacAddress(saved.mac))
        filter = self.filter
        filter.modes = {name: name in saved.modes for name in filter.modes}
        filter.stations, filter.groups = (
            frozenset(saved.stations),
            frozenset(saved.groups),
        )
        self.active_pairs = saved.active_pairs

    def was_reset(self) -> None:
        self.filter.reset()
        self.active_pairs = 1
        if self.filter.mac != self.permanent_mac:
            try:
                self.backend.set_mac(self.permanent_mac)
            except VbusError:  # somebody took it meanwhile: keep the one we have
                self.permanent_mac = self.mac
            self.filter.mac = bytes(self.permanent_mac)
        self.config.set("mac", bytes(self.permanent_mac))

    # Queues

    @property
    def header_size(self) -> int:
        """Bytes before a frame; a legacy driver without MRG_RXBUF has fewer."""
        modern = self.has(Ring.VERSION_1) or self.has(Feature.MRG_RXBUF)
        return HEADER.size if modern else netheader.LEGACY_SIZE

    @property
    def control_index(self) -> int:
        """The control queue, whose place moves with MQ."""
        return 2 * self.max_pairs

    def queue_stopped(self, queue: DeviceQueue) -> None:
        if queue.index % 2 == 0 and queue.index // 2 < self._pairs:
            self._receivers[queue.index // 2].clear()
        self._touched.discard(queue.index)

    async def drive(self, queue: DeviceQueue, ring: LiveRing) -> None:
        """Drain transmit and control; receive buffers are taken as frames come."""
        index = queue.index
        control = index == self.control_index and self.has(Feature.CTRL_VQ)
        if control or (index % 2 == 1 and index < self.control_index):
            await super().drive(queue, ring)
        else:
            await trio.sleep_forever()

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        if queue.index % 2:
            self._transmit(chains)
            done = [(chain, 0) for chain in chains]
        else:
            done = [(chain, self._command(chain)) for chain in chains]
            self.save()
        self.complete_batch(queue.index, ring, done)
        await trio.lowlevel.checkpoint()

    def _command(self, chain: Chain) -> int:
        if chain.readable < 2 or chain.writable < 1:
            raise MalformedError("a command without its class or room for the answer")
        data = chain.read(0, min(chain.readable, 1 << 16))
        result = answer(self, data)
        self._counts["commands"] += 1
        self._counts["refused_commands"] += result
        chain.write(0, bytes([result]))
        return 1

    # From the driver

    def _transmit(self, chains: Sequence[Chain]) -> None:
        frames: list[Frame] = []
        size = self.header_size
        for chain in chains:
            try:
                if chain.writable or chain.readable > netheader.MAX_FRAME + size:
                    raise InvalidError("a frame that is too long, or has room for data")
                frames += netheader.from_driver(chain.read(), size, self.features)
            except InvalidError:
                self._counts["tx_errors"] += 1
        for first in range(0, len(frames), BATCH):
            self._forward(frames[first : first + BATCH])

    def _forward(self, frames: list[Frame]) -> None:
        batch = FrameBatch()
        try:
            batch.load(frames)
        except InvalidError:
            if len(frames) == 1:
                self._counts["tx_errors"] += 1
            else:
                for frame in frames:
                    self._forward([frame])
            return
        self._counts["tx_frames"] += len(frames)
        self._counts["tx_bytes"] += sum(len(frame[0]) for frame in frames)
        self.backend.forward(batch)

    # To the driver

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        """Copy frames into the driver's buffers, at once; `flush` tells it."""
        for index in range(first, first + count):
            frame = batch.frame(index)
            receiver = self._receivers[self._steer(frame[0])]
            ring = self.queues[receiver.index].ring
            if not self._live_link or ring is None:
                self._counts["rx_dropped"] += 1
            elif not self.filter.wants(frame[0][:6]):
                self._counts["rx_filtered"] += 1
            else:
                self._deliver(batch, index, frame, receiver, ring)
        self._publish()

    def _deliver(
        self,
        batch: FrameBatch,
        index: int,
        frame: Frame,
        receiver: _Receiver,
        ring: LiveRing,
    ) -> None:
        frames = [frame]
        if not netheader.takes(frame, self.features):
            frames = batch.plain(index, not self.has(Feature.GUEST_CSUM))
            self._counts["finished"] += 1
        try:
            for each in frames:
                self._put(each, receiver, ring)
        except VbusError as error:
            self.fail(f"queue {receiver.index}: {error}")

    @property
    def _live_link(self) -> bool:
        return self.broken is None and self.config.number("status") & LINK_UP != 0

    def _steer(self, frame: bytes) -> int:
        """Frames of one flow go to one queue."""
        if self.active_pairs == 1:
            return 0
        return zlib.crc32(frame[14:54]) % self.active_pairs

    def _put(self, frame: Frame, receiver: _Receiver, ring: LiveRing) -> None:
        """Copy a frame behind its header into one buffer, or several (MRG_RXBUF)."""
        size = self.header_size
        need = size + len(frame[0])
        chains = self._take_buffers(need, receiver, ring)
        if chains is None:
            return
        data = netheader.to_driver(frame, size, len(chains)) + frame[0]
        at = 0
        for chain in chains:
            part = data[at : at + chain.writable]
            chain.write(0, part)
            receiver.filled.append((chain, len(part)))
            at += len(part)
        self._counts["rx_frames"] += 1
        self._counts["rx_bytes"] += len(frame[0])

    def _take_buffers(
        self, need: int, receiver: _Receiver, ring: LiveRing
    ) -> list[Chain] | None:
        """Take buffers with room for `need` bytes; None: there are not enough."""
        taken: list[Chain] = []
        room = 0
        while room < need and (not taken or self.has(Feature.MRG_RXBUF)):
            if not receiver.buffers:
                receiver.buffers.extend(ring.pop(BATCH))
            if not receiver.buffers:
                break
            chain = receiver.buffers.popleft()
            taken.append(chain)
            if chain.readable or chain.writable < self.header_size:
                raise MalformedError("a receive buffer without room for the header")
            room += chain.writable
        if room >= need:
            return taken
        receiver.buffers.extendleft(reversed(taken))
        too_short = bool(taken) and not self.has(Feature.MRG_RXBUF)
        self._counts["rx_length_errors" if too_short else "rx_dropped"] += 1
        return None

    def _publish(self) -> None:
        for receiver in self._receivers:
            ring = self.queues[receiver.index].ring
            if not receiver.filled or ring is None:
                continue
            try:
                ring.push(receiver.filled)
            except VbusError as error:
                self.fail(f"queue {receiver.index}: {error}")
            receiver.filled.clear()
            self._touched.add(receiver.index)

    def flush(self) -> None:
        """Tell the driver about the delivered frames."""
        for index in self._touched:
            ring = self.queues[index].ring
            if ring is not None:
                self.interrupt(index, ring)
        self._touched.clear()

    def io_statistics(self) -> NetStatistics:
        """A snapshot of the counters."""
        return NetStatistics(**self._counts)
