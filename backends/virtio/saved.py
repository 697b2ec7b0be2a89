"""A device as it stands, for the process that goes on with it.

What is in flight is not here, but in the records of its queues.
"""

from typing import Final

import msgspec

from backends.virtio.device_queue import DeviceQueue, SavedQueue
from backends.virtio.queue import record_size
from shm import AddressSpace, View
from vbus.errors import InvalidError

QUEUES: Final = 64
ENTRIES: Final = 256
"""Most queues, and entries of a queue, that a device here has."""
_SLOT: Final = -(-record_size(ENTRIES) // 4096) * 4096
AREA: Final = QUEUES * _SLOT
"""Bytes for the records of all queues, one after the other, each on a page."""


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device, without what a model adds; that is in `extra`."""

    status: int
    accepted: int
    features: int
    broken: str | None
    generation: int
    config: bytes
    queues: tuple[SavedQueue, ...]
    extra: bytes = b""


class Records:
    """The records of all queues, in one area."""

    def __init__(self, area: AddressSpace) -> None:
        self._area = area

    def of(self, queue: DeviceQueue) -> View:
        """Give a queue's. Raises InvalidError if there is no room for it."""
        if queue.index >= QUEUES or queue.max_size > ENTRIES:
            raise InvalidError(f"queue {queue.index} has no room for its record")
        return self._area.view(queue.index * _SLOT, _SLOT)
