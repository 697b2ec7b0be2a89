"""The example of a device: it answers calls with their data, a ring with a ring.

call 0              the data comes back
ring 0, requests    the guest fills it
ring 1, replies     the guest posts empty buffers; each request comes back in one
"""

from collections.abc import Sequence

from vbus.device import Connection, Device, SharedMemory, call, main
from vbus.errors import InvalidError

REQUESTS, REPLIES = 0, 1
BATCH = 64


class Echo(Device):
    """Returns whatever it gets."""

    type = "org.vbus.echo"

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        if shm.id not in (REQUESTS, REPLIES):
            raise InvalidError(f"echo has no ring {shm.id}")
        shm.ring()

    def save(self, connection: Connection) -> bytes:
        """All there is to know lies in the rings."""
        return b""

    def resume(
        self, connection: Connection, state: bytes, shared: Sequence[SharedMemory]
    ) -> None:
        for shm in shared:
            shm.ring()

    async def run(self, connection: Connection) -> None:
        requests = await connection.consumer(REQUESTS)
        replies = await connection.producer(REPLIES)
        while True:
            await requests.wait()
            await replies.wait()
            requests.ring.forward(replies.ring, BATCH)
            requests.ring.signal.inject()
            replies.ring.signal.inject()


if __name__ == "__main__":
    main(Echo)
