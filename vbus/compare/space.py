"""Spaces that are given out in ranges: addresses, ports, bus numbers, vectors.

A `Space` knows what is taken and refuses what does not fit, by name. It does not know
what the ranges are for.
"""

from bisect import bisect_right
from dataclasses import dataclass

from vbus.errors import InvalidError, NoSpaceError


class ExhaustedError(NoSpaceError):
    """A resource ran out: `resource` is its name, `detail` what did not fit."""

    def __init__(self, resource: str, detail: str) -> None:
        super().__init__(f"{resource} ran out: {detail}")
        self.resource = resource
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `start` on, taken by `owner`."""

    start: int
    size: int
    owner: str = ""

    @property
    def end(self) -> int:
        """The first number behind it."""
        return self.start + self.size


def align_up(value: int, alignment: int) -> int:
    """Give the next multiple of a power of two."""
    return (value + alignment - 1) & ~(alignment - 1)


def align_down(value: int, alignment: int) -> int:
    """Give the multiple of a power of two that is at or below."""
    return value & ~(alignment - 1)


def power_of_two(value: int) -> int:
    """Give the smallest power of two that is not below a positive number."""
    return 1 << (value - 1).bit_length()


class Space:
    """The numbers from `start` to before `end`, of which `used` are taken."""

    def __init__(self, name: str, start: int, end: int) -> None:
        self.name = name
        self.start = start
        self.end = end
        self.used = 0
        self._taken: list[Range] = []
        self._free: list[tuple[int, int]] = [(start, end)]

    @property
    def taken(self) -> tuple[Range, ...]:
        """Everything that was taken, in the order of taking."""
        return tuple(self._taken)

    def copy(self) -> "Space":
        """Give another in which the same is taken: for trying what fits."""
        made = Space(self.name, self.start, self.end)
        made.used, made._taken, made._free = self.used, [*self._taken], [*self._free]
        return made

    def take(self, size: int, alignment: int, owner: str) -> Range:
        """Take the lowest range that fits. Raises ExhaustedError."""
        for start, end in self._free:
            at = align_up(start, alignment)
            if at + size <= end:
                return self.place(at, size, owner)
        raise ExhaustedError(
            self.name,
            f"{owner} needs {size:#x} aligned to {alignment:#x},"
            f" {self.end - self.start - self.used:#x} of"
            f" {self.end - self.start:#x} are free",
        )

    def place(self, start: int, size: int, owner: str) -> Range:
        """Take a range at its place.

        Raises InvalidError if it is empty, ExhaustedError if any of it is not free.
        """
        if size < 1:
            raise InvalidError(f"{owner} asks for {size} of {self.name}")
        index = bisect_right(self._free, (start, self.end + 1)) - 1
        low, high = self._free[index] if index >= 0 else (0, 0)
        if not (low <= start and start + size <= high):
            raise ExhaustedError(
                self.name, f"{owner} does not fit at {start:#x}, size {size:#x}"
            )
        left = [(low, start)] if low < start else []
        right = [(start + size, high)] if start + size < high else []
        self._free[index : index + 1] = left + right
        taken = Range(start, size, owner)
        self._taken.append(taken)
        self.used += size
        return taken
