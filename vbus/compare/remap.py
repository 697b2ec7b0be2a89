"""What a guest can reach by moving its BARs (R53), with segments that have owners.

A guest writes its BARs as it likes. The configuration space that it is shown keeps
what was written; the hardware's BAR follows only into segments that are its group's. No
model of a bus: what reaches which address is `segments.py`'s table.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vbus.compare.segments import SegmentedSpace
from vbus.compare.space import Range


@dataclass(slots=True)
class VirtualBar:
    """A BAR of a group: `shown` to the guest, and where it is (`real`)."""

    space: SegmentedSpace
    group: str
    real: Range
    shown: int = field(init=False)

    def __post_init__(self) -> None:
        self.shown = self.real.start

    def write(self, value: int) -> None:
        """Do what the guest's write does; address bits below the size are fixed."""
        self.shown = value & 0xFFFF_FFFF & -self.real.size
        wanted = Range(self.shown, self.real.size, self.real.owner)
        if self.space.belongs(wanted, self.group):
            self.real = wanted


def reached(bars: Iterable[VirtualBar], values: Iterable[int]) -> tuple[int, int]:
    """Write every value to every BAR: count who would have come, and who has come, into
    addresses that are not its group's."""
    asked = got = 0
    wanted = tuple(values)
    for bar in bars:
        for value in wanted:
            bar.write(value)
            shown = Range(bar.shown, bar.real.size, bar.real.owner)
            asked += not bar.space.belongs(shown, bar.group)
            got += not bar.space.belongs(bar.real, bar.group)
    return asked, got
