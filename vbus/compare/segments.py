"""Segmented MMIO: a region in equal segments, each owned by one isolation group.

A remapping table names the owner of each segment, so BARs of different groups never
share one; a BAR larger than a segment takes consecutive ones (R52). The same division
serves 32-bit memory and the 64-bit regions that VF BARs lie in.
"""

from vbus.compare.space import ExhaustedError, Range, Space, align_up
from vbus.errors import InvalidError

SEGMENTS = 128


class SegmentedSpace:
    """A region of `size` bytes from `start` on, in `segments` equal parts."""

    def __init__(
        self, name: str, start: int, size: int, segments: int = SEGMENTS
    ) -> None:
        self.name = name
        self.segment = size // segments
        if self.segment * segments != size or self.segment & (self.segment - 1):
            raise InvalidError(f"{size:#x} is not {segments} powers of two")
        self.start = start
        self._table = Space(f"segments of {name}", 0, segments)
        self._open: dict[str, list[Space]] = {}

    @property
    def owners(self) -> tuple[Range, ...]:
        """The remapping table: runs of segments and the group of each."""
        return self._table.taken

    @property
    def claimed(self) -> int:
        """Bytes of all segments that have an owner."""
        return self._table.used * self.segment

    def belongs(self, wanted: Range, group: str) -> bool:
        """Tell whether a range lies in segments of this group, all of it."""
        first, last = (
            (at - self.start) // self.segment for at in (wanted.start, wanted.end - 1)
        )
        return all(
            any(
                run.start <= segment < run.end and run.owner == group
                for run in self.owners
            )
            for segment in range(first, last + 1)
        )

    def take(self, size: int, group: str, owner: str) -> Range:
        """Give a BAR its address. Raises ExhaustedError."""
        for space in self._open.get(group, []):
            try:
                return space.take(size, size, owner)
            except ExhaustedError:
                continue
        space = self._more(size, group)
        return space.take(size, size, owner)

    def _more(self, size: int, group: str) -> Space:
        """Give a group the segments for one more BAR.

        The run is aligned as the BAR has to be; the region itself is aligned enough.
        """
        count = align_up(size, self.segment) // self.segment
        run = self._table.take(count, count, group)
        start = self.start + run.start * self.segment
        space = Space(self.name, start, start + run.size * self.segment)
        self._open.setdefault(group, []).append(space)
        return space
