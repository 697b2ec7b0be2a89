"""Virtqueues from the driver's side: split and packed rings (virtio 1.2, 2.7 and 2.8).

`DriverQueue` is the compiled core: only there are fences, without which a kick or an
interrupt gets lost. It allocates nothing, and does not wait.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

from proxy.virtio import _core
from shm import AddressSpace
from vbus.errors import InvalidError

_PAGE = 4096
_DESCRIPTOR = 16


class RingLayout(NamedTuple):
    """Addresses of a ring's parts, as the device is told them."""

    desc: int
    driver: int
    device: int

    @classmethod
    def at(cls, address: int, size: int) -> Self:
        """Lay a ring from `address` on, as legacy devices have it; fit for packed."""
        driver = address + _DESCRIPTOR * size
        end = driver + 2 * (3 + size)
        return cls(address, driver, -(-end // _PAGE) * _PAGE)

    @classmethod
    def bytes_for(cls, size: int) -> int:
        """Say how much memory such a ring takes, from a page's begin on."""
        return cls.at(0, size).device + 6 + 8 * size


def table_bytes(size: int, entries: int) -> int:
    """Say how much memory the indirect tables of a ring take."""
    return _DESCRIPTOR * size * entries


@dataclass(frozen=True)
class DriverQueueStatistics:
    """Chains collected; decisions to kick the device, or not to."""

    size: int
    collected: int
    kicked: int
    suppressed: int
    broken: str | None


class DriverQueue(_core.Queue):
    """The driver's end of a ring, `DriverQueue(space, size, layout, features)`.

    A device that breaks a rule breaks the queue: `broken` names the rule, and
    `add_batch` and `collect` raise DriverQueueError.

    add_batch([(readable, writable, token), ...])
        Add chains of buffers (address, size), given as sequences. Returns how many
        there was room for. Raises InvalidError for a chain that never fits; those
        before it are added.
    kick_needed()
        Must the device be kicked for what was added since this was asked last?
    collect(limit)
        Chains that the device gave back, as (token, bytes it wrote).
    disable_interrupts(), enable_interrupts()
        A hint that we are awake; a wish for an interrupt. If that returns True there
        may be a chain already (or the queue is broken): look again, nobody will tell.
    room, in_flight
        Free descriptors; chains that the device has.
    """

    __slots__ = ()

    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        layout: RingLayout,
        features: int,
        *,
        tables: int = 0,
        entries: int = 0,
    ) -> Self:
        """Lay a fresh ring into our memory, of the kind that the feature word says.

        With INDIRECT_DESC, chains of two up to `entries` buffers take one descriptor;
        their tables lie at `tables` (`table_bytes`). Raises InvalidError, FaultError.
        """
        if not 0 < size <= 0xFFFF:
            raise InvalidError(f"a ring cannot have {size} entries")
        return super().__new__(cls, space, size, *layout, features, tables, entries)

    def statistics(self) -> DriverQueueStatistics:
        """A snapshot of the counters."""
        return DriverQueueStatistics(self.size, *self._counters(), self.broken)


__all__ = ["DriverQueue", "DriverQueueStatistics", "RingLayout", "table_bytes"]
