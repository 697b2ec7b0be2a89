"""A learning Ethernet switch: the device that ports and uplinks of venet attach to.

It has no interface on the bus. Frames come in batches from one port and go on in runs
of equal addresses, with one table look-up and one call per run.
"""

import time
from dataclasses import dataclass
from enum import Enum

from backends.venet.mactable import MacTable
from shm import Gauge
from vbus.device import Device, Host, attribute
from vbus.errors import InvalidError
from vbus.net import Direction, FrameBatch, FrameWatchers, MacAddress

_DECISION_LIFE_S = 1.0
_DECISIONS = 4096


class Port:
    """One port of a switch, to be subclassed by what is behind it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.decisions: dict[bytes, _Decision] = {}
        """The switch's; what it decided for (destination, source) from this port."""

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        """Send frames out of this port, at once; what has no room is dropped."""
        raise NotImplementedError

    def flush(self) -> None:
        """All frames of a batch were delivered: tell who is behind the port."""


class _Fate(Enum):
    FORWARD = "forward"
    FLOOD = "flood"
    FILTER = "filter"
    SPOOF = "spoof"


@dataclass(frozen=True, slots=True)
class _Decision:
    fate: _Fate
    ports: tuple[Port, ...] = ()


@dataclass(frozen=True)
class SwitchStatistics:
    """Frames by what became of them, and the table.

    `filtered`: for the port they came from, or link-local; `spoofed`: sent with an
    address that belongs to another port or to no single station; `refused`: addresses
    not learned for lack of room.
    """

    forwarded: int
    flooded: int
    filtered: int
    spoofed: int
    ports: Gauge
    macs: Gauge
    refused: int


def _positive(value: object) -> int:
    number = int(str(value))
    if number < 1:
        raise InvalidError(f"{number} is less than 1")
    return number


def _link_local(destination: bytes) -> bool:
    """Addresses a bridge does not pass on (IEEE 802.1D, 7.12.6)."""
    return destination[:5] == b"\x01\x80\xc2\x00\x00" and destination[5] < 16


class Switch(Device):
    """Ethernet switch. Ports attach themselves; it needs no link to a bus."""

    transparent = True  # addresses are learned anew

    mac_age_s = attribute(
        _positive, default=300, writable=True, doc="forget an address after so long"
    )
    mac_limit = attribute(
        _positive, default=1024, writable=True, doc="addresses learned per port"
    )

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        self.table: MacTable[Port] = MacTable(
            age_s=self.mac_age_s, limit=self.mac_limit, clock=self.clock
        )
        self.frames = FrameWatchers()
        self._ports: list[Port] = []
        self._decided_at = self.clock()
        self._decided_with = -1
        self._frames = dict.fromkeys(_Fate, 0)

    def clock(self) -> float:
        """Seconds, for the age of addresses."""
        return time.monotonic()

    def attribute_changed(self, name: str) -> None:
        self.table.age_s = self.mac_age_s
        self.table.limit = self.mac_limit

    def attach(self, port: Port, mac: MacAddress | None = None) -> None:
        """Add a port; `mac` is its own. Raises ExistsError if that is taken."""
        if mac is not None:
            self.table.set_static(mac, port)
        self._ports.append(port)
        self._forget_decisions()

    def detach(self, port: Port) -> None:
        """Remove a port and every address behind it; nothing if not attached."""
        if port in self._ports:
            self._ports.remove(port)
        self.table.forget(port)
        self._forget_decisions()

    def set_mac(self, port: Port, old: MacAddress, new: MacAddress) -> None:
        """Give a port another address of its own. Raises ExistsError."""
        self.table.set_static(new, port)
        if new != old:
            self.table.remove_static(old)

    def forward(self, source: Port, batch: FrameBatch) -> None:
        """Send all frames of a batch where they belong."""
        if self.frames:
            self.frames.show(source.name, Direction.IN, batch, 0, len(batch))
        self._refresh_decisions()
        touched: set[Port] = set()
        for key, first, count in batch.runs():
            decision = source.decisions.get(key)
            if decision is None:
                decision = self._decide(source, key)
            self._frames[decision.fate] += count
            for port in decision.ports:
                port.deliver(batch, first, count)
            touched.update(decision.ports)
        for port in touched:
            port.flush()

    def _decide(self, source: Port, key: bytes) -> _Decision:
        decision = self._judge(source, key[:6], key[6:])
        if self.table.version != self._decided_with:
            self._refresh_decisions()
        if len(source.decisions) >= _DECISIONS:
            source.decisions.clear()
        source.decisions[key] = decision
        return decision

    def _judge(self, source: Port, to: bytes, by: bytes) -> _Decision:
        if by[0] & 1 or not self.table.learn(by, source):
            return _Decision(_Fate.SPOOF)
        if _link_local(to):
            return _Decision(_Fate.FILTER)
        target = None if to[0] & 1 else self.table.find(to)
        if target is source:
            return _Decision(_Fate.FILTER)
        if target is not None:
            return _Decision(_Fate.FORWARD, (target,))
        others = tuple(port for port in self._ports if port is not source)
        return _Decision(_Fate.FLOOD, others)

    def _refresh_decisions(self) -> None:
        """Decide anew when the table changed, and now and then so that it can age."""
        now = self.clock()
        if now - self._decided_at >= _DECISION_LIFE_S:
            self.table.expire()
        elif self.table.version == self._decided_with:
            return
        self._decided_at = now
        self._forget_decisions()

    def _forget_decisions(self) -> None:
        self._decided_with = self.table.version
        for port in self._ports:
            port.decisions.clear()

    def statistics(self) -> SwitchStatistics:
        """A snapshot of the counters."""
        return SwitchStatistics(
            forwarded=self._frames[_Fate.FORWARD],
            flooded=self._frames[_Fate.FLOOD],
            filtered=self._frames[_Fate.FILTER],
            spoofed=self._frames[_Fate.SPOOF],
            ports=len(self._ports),
            macs=len(self.table),
            refused=self.table.refused,
        )
