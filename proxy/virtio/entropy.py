"""virtio-rng from the driver's side: random bytes of the host (virtio 1.2, 5.4)."""

from dataclasses import dataclass
from typing import Final

import trio

from proxy.tasks import unwrapped
from proxy.virtio.device import VirtioDevice
from proxy.virtio.queue import RequestQueue, SlotPool
from vbus.errors import InvalidError, ProtocolError

_CHUNK: Final = 4096


@dataclass(frozen=True)
class EntropyStatistics:
    """Bytes and answers the device gave."""

    bytes: int
    answers: int


class Entropy:
    """A source of entropy that was brought up by `start`."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self._queue: RequestQueue | None = None
        self._pool: SlotPool | None = None
        self._bytes = self._answers = 0

    async def start(self, *, packed: bool = False) -> None:
        """Bring the device up; `run` must run for requests to be answered."""
        await self.device.negotiate(0, packed=packed)
        self._queue = RequestQueue(await self.device.open_queue(0, 8))
        self._pool = SlotPool(self.device.transport, 2, _CHUNK)
        await self.device.ready()

    async def run(self) -> None:
        """Take answers, until cancelled or the device breaks or goes."""
        assert self._queue is not None
        with unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._queue.run)
                nursery.start_soon(self.device.watch)

    async def read(self, size: int) -> bytes:
        """Ask for random bytes. Raises InvalidError before `start`."""
        parts = b""
        while len(parts) < size:
            parts += await self._ask(min(_CHUNK, size - len(parts)))
        return parts

    async def _ask(self, size: int) -> bytes:
        if self._queue is None or self._pool is None:
            raise InvalidError(f"{self.device.name} is not started")
        async with self._pool.slot() as slot:
            written = await self._queue.ask(slot, [], [slot.at(0, size)])
            if not written:
                raise ProtocolError(f"{self.device.name} gives no entropy")
            self._bytes += written
            self._answers += 1
            return slot.view.read(0, written)

    def statistics(self) -> EntropyStatistics:
        """A snapshot of the counters."""
        return EntropyStatistics(self._bytes, self._answers)
