"""virtio-rng (virtio 1.2, section 5.4): the kernel's random bytes, so many a second.

The limit keeps one driver from spending the host's time; a chain waits for its turn.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from backends.virtio.constants import DeviceId
from backends.virtio.device import (
    Chain,
    DeviceQueue,
    LiveRing,
    MalformedError,
    VirtioDevice,
)
from vbus.errors import InvalidError

CHUNK: Final = 4096
"""Most bytes in one chain; the driver is told how many there are, and asks again."""


@dataclass(frozen=True)
class RngStatistics:
    """Bytes given; how often a driver had to wait for the limit."""

    given_bytes: int
    waits: int


class VirtioRng(VirtioDevice):
    """A source of entropy."""

    device_id = DeviceId.ENTROPY

    def __init__(
        self,
        *,
        bytes_per_second: int = 0,
        queue_size: int = 8,
        source: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`bytes_per_second`: the limit, after a first CHUNK; 0: none.

        `source` is os.urandom outside of tests. Raises InvalidError.
        """
        if bytes_per_second < 0:
            raise InvalidError(f"a limit of {bytes_per_second} bytes is below 0")
        super().__init__([queue_size])
        self._rate = bytes_per_second
        self._source = source
        self._free_at = float("-inf")
        self._given = self._waits = 0

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        for chain in chains:
            if chain.readable or not chain.writable:
                raise MalformedError("a request for entropy is only device-writable")
            size = min(chain.writable, CHUNK)
            await self._take(size)
            if not ring.alive:
                return
            chain.write(0, self._source(size))
            self._given += size
            self.complete(queue.index, ring, chain, size)

    async def _take(self, size: int) -> None:
        """Wait until `size` bytes are due; what was not used is saved up to a CHUNK."""
        await trio.lowlevel.checkpoint()
        if self._rate == 0:
            return
        now = trio.current_time()
        self._free_at = max(self._free_at, now - CHUNK / self._rate) + size / self._rate
        if self._free_at > now:
            self._waits += 1
            await trio.sleep_until(self._free_at)

    def io_statistics(self) -> RngStatistics:
        """A snapshot of the counters."""
        return RngStatistics(self._given, self._waits)
