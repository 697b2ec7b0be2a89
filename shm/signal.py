"""shm-signal: notifications about shared memory, as few as possible (ABI section 5)."""

from dataclasses import dataclass
from enum import IntEnum

from shm import _core


class Locality(IntEnum):
    """Which side of shared memory one is: north owns it, south is the device."""

    NORTH = 0
    SOUTH = 1


@dataclass(frozen=True)
class SignalStatistics:
    """`injects` we were asked for, and the `notifications` that really crossed."""

    injects: int
    notifications: int


class ShmSignal(_core.Signal):
    """One side's end of a shm-signal, `ShmSignal(view, offset, locality, notify)`.

    `notify` is called, inside `inject`, when the boundary is to be crossed. Raises
    `InvalidError` where no signal lies (`ShmSignal.format` lays one); every method
    raises `FaultError` once the memory is gone.
    """

    def statistics(self) -> SignalStatistics:
        """A snapshot of the counters."""
        return SignalStatistics(*self._counters())
