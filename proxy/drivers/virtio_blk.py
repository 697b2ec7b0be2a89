"""Drives a virtio disk: an async block API, and NBD for others to use it by."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from proxy.tasks import beside
from proxy.virtio.device import VirtioDevice
from proxy.virtio.disk import Disk, DiskStatistics
from proxy.virtio.nbdserver import in_kernel, serve_unix


class BlkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kernel`: be a /dev/nbdN of this machine. `nbd`: serve at this Unix socket."""

    kernel: bool = False
    nbd: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class BlkDriverStatistics:
    """Where the disk is, and what was done with it."""

    node: str
    nbd: str
    disk: DiskStatistics


class BlkDriver:
    """Drives one disk; `disk` is its API while it runs."""

    def __init__(self, device: VirtioDevice, options: Mapping[str, object]) -> None:
        self.options = msgspec.convert(dict(options), BlkOptions, strict=False)
        self.disk = Disk(device)
        self._node = ""

    async def run(self, started: Callable[[str], None]) -> None:
        """Bring it up and serve it."""
        await self.disk.start(packed=self.options.packed)
        async with (
            beside(self.disk.run),
            self._in_kernel() as self._node,
            trio.open_nursery() as nursery,
        ):
            if self.options.nbd is not None:
                await nursery.start(serve_unix, self.disk, Path(self.options.nbd))
            started(self._describe())
            await trio.sleep_forever()

    @asynccontextmanager
    async def _in_kernel(self) -> AsyncIterator[str]:
        if not self.options.kernel:
            yield ""
            return
        async with in_kernel(self.disk) as node:
            yield node

    def _describe(self) -> str:
        words = [f"{self.disk.size} bytes"]
        words += ["read-only"] if self.disk.read_only else []
        words += [self._node] if self._node else []
        words += [f"nbd+unix:///?socket={self.options.nbd}"] if self.options.nbd else []
        return ", ".join(words)

    def statistics(self) -> BlkDriverStatistics:
        """A snapshot of the counters."""
        nbd = self.options.nbd or ""
        return BlkDriverStatistics(self._node, nbd, self.disk.statistics())
