"""Drives a virtio source of entropy: an async API, and the kernel's pool."""

import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from proxy.tasks import beside
from proxy.virtio.device import VirtioDevice
from proxy.virtio.entropy import Entropy, EntropyStatistics
from vbus.errors import PermissionDeniedError

_RNDADDENTROPY: Final = 0x40085203
_FEED: Final = 64
"""Bytes at a time: twice what fills the kernel's pool."""
_PERIOD_S: Final = 60.0


class RngOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kernel`: feed the pool of this machine's kernel."""

    kernel: bool = False
    packed: bool = False


@dataclass(frozen=True)
class RngDriverStatistics:
    """What the device gave, and how many bytes of it the kernel got."""

    source: EntropyStatistics
    fed_bytes: int


class RngDriver:
    """Drives one source; `entropy` is its API while it runs."""

    def __init__(self, device: VirtioDevice, options: Mapping[str, object]) -> None:
        self.options = msgspec.convert(dict(options), RngOptions, strict=False)
        self.entropy = Entropy(device)
        self._fed = 0

    async def run(self, started: Callable[[str], None]) -> None:
        """Bring it up and, if so told, feed the kernel at once and every minute.

        Raises PermissionDeniedError where that is not allowed.
        """
        await self.entropy.start(packed=self.options.packed)
        async with beside(self.entropy.run):
            if not self.options.kernel:
                started("random bytes")
                await trio.sleep_forever()
            await self._feed()
            started("feeds /dev/random")
            while True:
                await trio.sleep(_PERIOD_S)
                await self._feed()

    async def _feed(self) -> None:
        data = await self.entropy.read(_FEED)
        try:
            fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
            try:
                about = struct.pack("ii", 8 * len(data), len(data))
                fcntl.ioctl(fd, _RNDADDENTROPY, about + data)
            finally:
                os.close(fd)
        except PermissionError:
            raise PermissionDeniedError(
                "feeding /dev/random needs CAP_SYS_ADMIN"
            ) from None
        self._fed += len(data)

    def statistics(self) -> RngDriverStatistics:
        """A snapshot of the counters."""
        return RngDriverStatistics(self.entropy.statistics(), self._fed)
