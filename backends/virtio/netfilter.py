"""Which frames a virtio-net driver wants: its address, its table, its modes (5.1.6.5).

Until a driver sets a mode it gets everything, as a driver without CTRL_RX expects.
"""

import struct
from typing import Final

from vbus.errors import InvalidError

TABLE_LIMIT: Final = 1024
_BROADCAST: Final = b"\xff" * 6
_MODES: Final = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")


class ReceiveFilter:
    """Decides by destination address; `mac` is the driver's own."""

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.reset()

    def reset(self) -> None:
        """Let everything through."""
        self.modes = dict.fromkeys(_MODES, False)
        self.modes["promisc"] = True
        self.stations: frozenset[bytes] = frozenset()
        self.groups: frozenset[bytes] = frozenset()

    def set_mode(self, command: int, data: bytes) -> None:
        """Take a command of class RX. Raises InvalidError."""
        if command >= len(_MODES) or len(data) != 1 or data[0] > 1:
            raise InvalidError(f"receive mode {command}: {data.hex()}")
        self.modes[_MODES[command]] = bool(data[0])

    def set_table(self, data: bytes) -> None:
        """Take two lists of addresses, stations then groups. Raises InvalidError."""
        stations, rest = _addresses(data)
        groups, rest = _addresses(rest)
        if rest or any(a[0] & 1 for a in stations) or any(not a[0] & 1 for a in groups):
            raise InvalidError("a table with addresses of the wrong kind, or too long")
        self.stations, self.groups = stations, groups

    def wants(self, destination: bytes) -> bool:
        """Does the driver get a frame with this destination?"""
        modes = self.modes
        if modes["promisc"]:
            return True
        if destination == _BROADCAST:
            return not modes["nobcast"]
        if destination[0] & 1:
            in_table = destination in self.groups
            return not modes["nomulti"] and (modes["allmulti"] or in_table)
        if modes["nouni"]:
            return False
        own = destination == self.mac or destination in self.stations
        return own or modes["alluni"]


def _addresses(data: bytes) -> tuple[frozenset[bytes], bytes]:
    if len(data) < 4:
        raise InvalidError("a table without its number of entries")
    (count,) = struct.unpack_from("<I", data)
    end = 4 + 6 * count
    if count > TABLE_LIMIT or end > len(data):
        raise InvalidError(f"a table of {count} addresses in {len(data)} bytes")
    found = frozenset(data[at : at + 6] for at in range(4, end, 6))
    return found, data[end:]
