"""A transparent device that counts: a lost or a doubled call would show."""

import struct
import time
from collections.abc import Sequence
from typing import ClassVar

import trio

from vbus.device import Connection, Device, SharedMemory, call
from vbus.errors import InvalidError

_TOTAL = struct.Struct("<Q")


class Tally(Device):
    """Counts calls of each connection, and wakes the guest for each."""

    type = "org.vbus.test.tally"
    transparent = True
    area_size = 4096
    max_connections = 4

    totals: ClassVar[dict[Connection, int]] = {}

    def open(self, connection: Connection) -> None:
        self.totals[connection] = 0

    def close(self, connection: Connection) -> None:
        del self.totals[connection]

    def save(self, connection: Connection) -> bytes:
        return _TOTAL.pack(self.totals[connection])

    def resume(
        self, connection: Connection, state: bytes, shared: Sequence[SharedMemory]
    ) -> None:
        if len(state) != _TOTAL.size:
            raise InvalidError("no state of a tally")
        (self.totals[connection],) = _TOTAL.unpack(state)
        assert connection.area is not None

    @call(0)
    def count(self, connection: Connection, data: bytes) -> bytes:
        self.totals[connection] += 1
        return _TOTAL.pack(self.totals[connection])

    @call(1)
    async def count_slowly(self, connection: Connection, data: bytes) -> bytes:
        await trio.sleep(0.01)
        return self.count(connection, data)

    @call(2)
    def hang(self, connection: Connection, data: bytes) -> None:
        time.sleep(3600)

    @call(3)
    def spoil(self, connection: Connection, data: bytes) -> None:
        """Lie to the process after this one."""
        assert connection.area is not None
        connection.area.write(0, bytes(4096))
        self.save = lambda _: b"garbage"  # type: ignore[method-assign]
