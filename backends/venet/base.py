"""What all venet devices share: functions, attributes, one session at a time."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from backends.venet.session import OFFERED, SPIN_US, Group, Session, Shm, parse_spin
from vbus.device import Connection, Device, Host, SharedMemory, attribute, call
from vbus.errors import InvalidError
from vbus.net import Direction, FrameBatch, FrameWatchers, HostEnd, MacAddress
from vbus.net._core import RECORD_SIZE

_MAC = struct.Struct("6s")
_COUNTERS = 12


@dataclass(frozen=True)
class VenetStatistics:
    """Frames from the guest (tx) and to it (rx), over all its connections.

    `tx_length_errors` and `tx_frame_errors` broke a rule of ABI 7.4; `rx_dropped` found
    no buffer or the link down; `rx_length_errors` were longer than the buffer.
    `segmented` and `checksummed` frames were finished in software for a guest that
    cannot; `deferred_events` waited for room in the event ring; `signals` crossed to
    the guest.
    """

    link_up: bool
    mac: str
    signals: int
    tx_frames: int
    tx_bytes: int
    tx_length_errors: int
    tx_frame_errors: int
    rx_frames: int
    rx_bytes: int
    rx_dropped: int
    rx_length_errors: int
    segmented: int
    checksummed: int
    deferred_events: int
    flushed: int


def parse_mac(value: object) -> str:
    """Take an address and give it back in its usual form."""
    return str(MacAddress.parse(str(value)))


def parse_mtu(value: object) -> int:
    """Take an MTU that frames of the bus can have."""
    mtu = int(str(value))
    if not 68 <= mtu <= 65521:
        raise InvalidError(f"an MTU of {mtu} is not between 68 and 65521")
    return mtu


def parse_count(value: object) -> int:
    """Take a number of packets."""
    count = int(str(value))
    if not 0 <= count <= 4096:
        raise InvalidError(f"{count} is not between 0 and 4096")
    return count


class VenetBase(Device):
    """A network device of a guest; subclasses say where its frames go."""

    type = "virtual-ethernet"
    version = 1
    transparent = True
    area_size = RECORD_SIZE

    client_mac = attribute(
        parse_mac,
        default="",
        writable=True,
        writable_while_open=False,
        doc="the guest's address; made from the device's name if not given",
    )
    mtu = attribute(parse_mtu, default=1500, doc="without the Ethernet header")
    txmitigation = attribute(
        parse_count,
        default=10,
        writable=True,
        doc="signal the guest after so many sent packets; 0: after each",
    )
    offload = attribute(
        bool, default=True, doc="offer scatter-gather, checksum and segmentation"
    )

    spin_us = attribute(
        parse_spin,
        default=SPIN_US,
        doc="look for frames up to so long before sleeping, while that pays off",
    )

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        if not self.client_mac:
            self.client_mac = str(MacAddress.from_name(name))
        self.frames = FrameWatchers()
        self._session: Session | None = None
        self._before = [0] * _COUNTERS
        self._signals_before = 0

    @property
    def mac(self) -> MacAddress:
        """The guest's address."""
        return MacAddress.parse(self.client_mac)

    def attribute_changed(self, name: str) -> None:
        if self._session is not None:
            self._session.end.limits(self.mtu, self.txmitigation)

    # For subclasses

    def forward(self, batch: FrameBatch) -> None:
        """Send the guest's frames on, within this call."""
        raise NotImplementedError

    def link_changed(self, up: bool) -> None:
        """The guest took its link up or down, or is gone."""

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        """Copy frames into the guest, if one is there."""
        if self._session is not None:
            if self.frames:
                self.frames.show(self.name, Direction.OUT, batch, first, count)
            self._session.deliver(batch, first, count)

    def flush(self) -> None:
        """Tell the guest about the delivered frames."""
        if self._session is not None:
            self._session.flush()

    # Connection

    def open(self, connection: Connection) -> None:
        self._new_session(connection).end.begin()

    def _new_session(self, connection: Connection) -> Session:
        offered = OFFERED if self.offload else {Group.EVENTQ: OFFERED[Group.EVENTQ]}
        area = connection.area
        record = None if area is None else area.view(0, RECORD_SIZE)
        end = HostEnd(self.mtu, self.txmitigation, record)
        self._session = Session(connection, end, offered, self.spin_us)
        return self._session

    def save(self, connection: Connection) -> bytes:
        return self._session_of(connection).save()

    def resume(
        self, connection: Connection, state: bytes, shared: Sequence[SharedMemory]
    ) -> None:
        session = self._new_session(connection)
        try:
            session.resume(state, shared)
        except BaseException:
            self._session = None
            raise
        if session.up.value:
            self.link_changed(True)

    def close(self, connection: Connection) -> None:
        session = self._session_of(connection)
        self._before = [a + b for a, b in zip(*self._counters(), strict=True)]
        self._signals_before += session.signals
        self._session = None
        session.end.set_up(False)
        if session.up.value:
            self.link_changed(False)

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        self._session_of(connection).share(shm)

    async def run(self, connection: Connection) -> None:
        session = self._session
        if session is not None and session.connection is connection:  # not closed yet
            await session.run(self._take)

    def _take(self, batch: FrameBatch) -> None:
        if self.frames:
            self.frames.show(self.name, Direction.IN, batch, 0, len(batch))
        self.forward(batch)

    def _session_of(self, connection: Connection) -> Session:
        assert self._session is not None
        assert self._session.connection is connection
        return self._session

    # Functions (7.2)

    @call(0)
    def linkup(self, connection: Connection, data: bytes) -> None:
        self._session_of(connection).link_up()
        self.link_changed(True)

    @call(1)
    def linkdown(self, connection: Connection, data: bytes) -> None:
        self._session_of(connection).link_down()
        self.link_changed(False)

    @call(2)
    def macquery(self, connection: Connection, data: bytes) -> bytes:
        if len(data) != _MAC.size:
            raise InvalidError("MACQUERY: an address has 6 bytes")
        return bytes(self.mac)

    @call(3)
    def negcap(self, connection: Connection, data: bytes) -> bytes:
        return self._session_of(connection).negotiate(data)

    @call(4)
    def flushrx(self, connection: Connection, data: bytes) -> None:
        self._session_of(connection).flush_rx()

    @call(5)
    def pmtdquery(self, connection: Connection, data: bytes) -> int:
        return Shm.TX_POOL

    @call(6)
    def evqquery(self, connection: Connection, data: bytes) -> bytes:
        return self._session_of(connection).query_events(data)

    @call(7)
    def l4roquery(self, connection: Connection, data: bytes) -> bytes:
        return self._session_of(connection).query_l4ro(data)

    def _counters(self) -> tuple[list[int], tuple[int, ...]]:
        now = self._session.end._counters() if self._session else (0,) * _COUNTERS
        return self._before, now

    def statistics(self) -> VenetStatistics:
        """A snapshot of the counters."""
        session = self._session
        return VenetStatistics(
            session is not None and session.up.value,
            self.client_mac,
            self._signals_before + (session.signals if session else 0),
            *(a + b for a, b in zip(*self._counters(), strict=True)),
        )
