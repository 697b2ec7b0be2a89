"""Which port an Ethernet address is behind: learned and forgotten, or fixed.

Pure: time comes from outside. The keys are addresses of single stations as six bytes,
the ports anything hashable.

    fixed by set_static ---> stays with its port; no other port may use the address
    learned from traffic --> moves with the station, ages, gives way to set_static
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from vbus.errors import ExistsError

Port = TypeVar("Port")


@dataclass(slots=True)
class _Entry(Generic[Port]):
    port: Port
    seen: float
    static: bool


class MacTable(Generic[Port]):
    """A learning table. Each port has its own limit, so none can crowd out others."""

    def __init__(self, *, age_s: float, limit: int, clock: Callable[[], float]) -> None:
        """Forget an address `age_s` after it was last seen; learn `limit` per port."""
        self.age_s = age_s
        self.limit = limit
        self.version = 0
        """Changes whenever `find` or `learn` might answer differently (except age)."""
        self.refused = 0
        """Addresses not learned because their port was at its limit."""
        self._clock = clock
        self._entries: dict[bytes, _Entry[Port]] = {}
        self._learned: dict[Port, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[bytes, Port, bool]]:
        """Iterate over (address, port, static)."""
        for mac, entry in self._entries.items():
            yield mac, entry.port, entry.static

    def set_static(self, mac: bytes, port: Port) -> None:
        """Fix an address to a port. Raises ExistsError if another port has it."""
        entry = self._entries.get(mac)
        if entry is not None and entry.static and entry.port != port:
            raise ExistsError(f"{mac.hex(':')} belongs to another port")
        if entry is not None:
            self._drop(mac)
        self._entries[mac] = _Entry(port, 0.0, True)
        self.version += 1

    def remove_static(self, mac: bytes) -> None:
        """Undo `set_static`; nothing if the address is not fixed."""
        entry = self._entries.get(mac)
        if entry is not None and entry.static:
            self._drop(mac)

    def learn(self, mac: bytes, port: Port) -> bool:
        """Note that `port` speaks with this address; False: it must not."""
        entry = self._entries.get(mac)
        if entry is None:
            self._add(mac, port)
            return True
        if entry.static:
            return entry.port == port
        if entry.port != port:
            self._drop(mac)
            self._add(mac, port)
        else:
            entry.seen = self._clock()
        return True

    def find(self, mac: bytes) -> Port | None:
        """Give the port an address is behind, None if not known (any more)."""
        entry = self._entries.get(mac)
        if entry is None:
            return None
        if not entry.static and self._clock() - entry.seen >= self.age_s:
            self._drop(mac)
            return None
        return entry.port

    def forget(self, port: Port) -> None:
        """Remove all addresses of a port, fixed ones too."""
        for mac in [mac for mac, entry in self._entries.items() if entry.port == port]:
            self._drop(mac)

    def expire(self) -> int:
        """Drop what has aged: how many."""
        limit = self._clock() - self.age_s
        old = [
            mac
            for mac, entry in self._entries.items()
            if not entry.static and entry.seen <= limit
        ]
        for mac in old:
            self._drop(mac)
        return len(old)

    def _add(self, mac: bytes, port: Port) -> None:
        if self._learned.get(port, 0) >= self.limit:
            self.refused += 1
            return
        self._entries[mac] = _Entry(port, self._clock(), False)
        self._learned[port] = self._learned.get(port, 0) + 1
        self.version += 1

    def _drop(self, mac: bytes) -> None:
        entry = self._entries.pop(mac)
        if not entry.static:
            self._learned[entry.port] -= 1
            if not self._learned[entry.port]:
                del self._learned[entry.port]
        self.version += 1
