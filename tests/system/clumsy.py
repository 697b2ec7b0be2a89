"""A device that does wrong in every way a device can, for tests with real processes."""

import trio

from vbus.device import Connection, Device, call
from vbus.errors import BusyError


class Clumsy(Device):
    """Blocks, fails, and tells whom it serves."""

    type = "org.vbus.test.clumsy"
    max_connections = 2

    def setup(self) -> None:
        self.cancelled = 0
        self.trips: dict[Connection, trio.Event] = {}
        self.fall = trio.Event()

    async def serve(self) -> None:
        await self.fall.wait()
        raise ZeroDivisionError("the device")

    async def open(self, connection: Connection) -> None:
        self.trips[connection] = trio.Event()

    async def run(self, connection: Connection) -> None:
        await self.trips[connection].wait()
        raise ZeroDivisionError("the connection")

    def close(self, connection: Connection) -> None:
        del self.trips[connection]

    @call(0)
    def guest(self, connection: Connection, data: bytes) -> bytes:
        return connection.guest.encode().ljust(len(data), b".")

    @call(1)
    async def block(self, connection: Connection, data: bytes) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1

    @call(2)
    def bug(self, connection: Connection, data: bytes) -> None:
        raise ZeroDivisionError("the call")

    @call(3)
    async def refuse(self, connection: Connection, data: bytes) -> None:
        raise BusyError("not now")

    @call(4)
    def trip(self, connection: Connection, data: bytes) -> None:
        self.trips[connection].set()

    @call(5)
    def fail(self, connection: Connection, data: bytes) -> None:
        self.fall.set()

    def statistics(self) -> dict[str, int]:
        return {"cancelled": self.cancelled, "open": len(self.trips)}
