"""What passed between guests and devices lately: calls and signals in a bounded ring.

Always in memory and never written anywhere by itself: `vbus trace` takes it out. To
record costs one tuple; what is recorded over and over pushes the oldest out.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Record(NamedTuple):
    """One thing that happened.

    `kind` and its `number`: "open" and "close" (the connection's version), "call" (the
    function), "share" (the memory's id), "signal" (to the guest, the memory's id),
    "ring" (from the guest by message, the memory's id). `size` is in bytes. `result` is
    0, an errno's negative, or None for what has no result; `duration_ns` how long the
    device took.
    """

    time_ns: int
    kind: str
    guest: str
    device: str
    number: int
    size: int
    result: int | None
    duration_ns: int


class Trace:
    """The last `size` records; with size 0 none, and `on` is false."""

    def __init__(self, size: int) -> None:
        self.on = size > 0
        self.total = 0
        """Records so far, with those that were pushed out."""
        self._ring: deque[tuple[int, str, str, str, int, int, int | None, int]]
        self._ring = deque(maxlen=size)

    def record(
        self,
        kind: str,
        guest: str,
        device: str,
        number: int = 0,
        size: int = 0,
        result: int | None = None,
        duration_ns: int = 0,
    ) -> None:
        """Note what happened now. Ask `on` first: that is what makes off cheap."""
        self.total += 1
        self._ring.append(
            (time.time_ns(), kind, guest, device, number, size, result, duration_ns)
        )

    def since(self, position: int) -> Iterator[Record]:
        """Give what was recorded after the first `position`, as far as it is there."""
        wanted = min(self.total - position, len(self._ring))
        for index in range(len(self._ring) - wanted, len(self._ring)):
            yield Record(*self._ring[index])

    def lost_since(self, position: int) -> int:
        """Count what was recorded after the first `position` and is gone."""
        return max(0, self.total - position - len(self._ring))


NO_TRACE = Trace(0)
