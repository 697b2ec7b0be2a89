"""Looking at frames on their way, as `vbus capture` does."""

from collections.abc import Callable
from enum import IntEnum

from vbus.net._core import FrameBatch


class Direction(IntEnum):
    """As pcapng counts (epb_flags, bits 0 and 1)."""

    IN = 1
    """From a guest or the host to the bus."""
    OUT = 2
    """From the bus."""


FrameWatcher = Callable[[str, Direction, FrameBatch, int, int], object]
"""Gets the port's name, the direction, and `count` frames of a batch from `first` on.

They are good during the call only, and belong to somebody who waits for it to return.
"""


class FrameWatchers:
    """Who looks at the frames of one device; false while nobody does."""

    def __init__(self) -> None:
        self._watchers: list[FrameWatcher] = []

    def __bool__(self) -> bool:
        return bool(self._watchers)

    def add(self, watcher: FrameWatcher) -> Callable[[], None]:
        """Show frames to `watcher` from now on; what is returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def show(
        self, port: str, direction: Direction, batch: FrameBatch, first: int, count: int
    ) -> None:
        """Let everybody look."""
        for watcher in tuple(self._watchers):
            watcher(port, direction, batch, first, count)
