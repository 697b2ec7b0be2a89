"""What waits for one `vbus capture`: frames of one device, bounded, losses counted.

The device's task only copies what fits; it never waits for a reader.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import trio

from vbus.device import Device
from vbus.errors import InvalidError
from vbus.net import Direction, FrameBatch, FrameWatchers

if TYPE_CHECKING:
    from vbus.daemon import Daemon

WAITING_LIMIT = 4 << 20
_CHUNK = 256 << 10
_OVERHEAD = 64
SNAPLEN_LIMIT = 256 << 10

Frame = tuple[str, int, int, int, int, int, int, bytes]
"""Port, time in ns, direction, length, flags, gso_type, gso_size, and the bytes."""


@runtime_checkable
class HasFrames(Protocol):
    """A device whose frames can be looked at."""

    frames: FrameWatchers


class Capture:
    """A context manager: inside of it frames are taken. For one reader."""

    def __init__(
        self, daemon: "Daemon", device: Device, snaplen: int, limit: int = WAITING_LIMIT
    ) -> None:
        """Look at a device; keep `snaplen` bytes of a frame, `limit` of all waiting.

        Raises InvalidError if the device has no frames.
        """
        if not isinstance(device, HasFrames):
            raise InvalidError(f"{device.name} has no frames that could be captured")
        self._frames = device.frames
        self._name = device.name
        self._daemon = daemon
        self._snaplen = snaplen
        self._limit = limit
        self._waiting: deque[Frame] = deque()
        self._size = 0
        self._dropped: Counter[str] = Counter()
        self._gone = False
        self._more = trio.lowlevel.ParkingLot()
        self._ends: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        self._ends = [self._frames.add(self._see), self._daemon.watch(self._changed)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for end in self._ends:
            end()

    def _changed(self, happening: dict[str, object]) -> None:
        if happening == {"event": "device-removed", "device": self._name}:
            self._gone = True
            self._more.unpark()

    def _see(
        self, port: str, direction: Direction, batch: FrameBatch, first: int, count: int
    ) -> None:
        now = time.time_ns()
        for index in range(first, first + count):
            if self._size >= self._limit:
                self._dropped[port] += first + count - index
                break
            data, length, *offload = batch.snap(index, self._snaplen)
            flags, gso_type, gso_size = offload
            self._waiting.append(
                (port, now, direction, length, flags, gso_type, gso_size, data)
            )
            self._size += len(data) + _OVERHEAD
        self._more.unpark()

    async def next(self) -> dict[str, object]:
        """Wait for {"frames": [...], "dropped": {port: count}}, or {"end": why}.

        `dropped` were lost after these frames and whatever came before them.
        """
        while not (self._waiting or self._dropped or self._gone):
            await self._more.park()
        if not self._waiting and not self._dropped:
            return {"end": f"{self._name} was removed"}
        taken: list[Frame] = []
        size = 0
        while self._waiting and size < _CHUNK:
            taken.append(self._waiting.popleft())
            size += len(taken[-1][-1]) + _OVERHEAD
        self._size -= size
        dropped: dict[str, int] = {}
        if not self._waiting:
            dropped, self._dropped = dict(self._dropped), Counter()
        return {"frames": taken, "dropped": dropped}
