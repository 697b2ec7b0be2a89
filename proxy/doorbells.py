"""Doorbells of a function for which its server gave us an eventfd.

A look for one brings whatever the server has; what we did not ask for is closed, and so
is everything with the table.
"""

from shm import Doorbell
from vbus.errors import ProtocolError
from vbus.vfio_user.transport import close_all
from vbus.vfio_user.wire import IoEventFdFlag, IoFdType, RegionIoFds, SubRegion

Place = tuple[int, int, int]
"""BAR, offset and the 32-bit value that is written there."""


class DoorbellTable:
    """Places we want to ring, and the eventfds of those that have one."""

    def __init__(self) -> None:
        self._wanted: set[Place] = set()
        self._bells: dict[Place, Doorbell] = {}

    def want(self, place: Place) -> None:
        """Keep the eventfd of this place when it comes."""
        self._wanted.add(place)

    def forget(self, place: Place) -> None:
        """Close it, and do not keep one that comes late."""
        self._wanted.discard(place)
        bell = self._bells.pop(place, None)
        if bell is not None:
            bell.close()

    def ring(self, place: Place) -> bool:
        """Ring by eventfd; False if there is none."""
        bell = self._bells.get(place)
        if bell is None:
            return False
        bell.ring()
        return True

    def take(self, answer: RegionIoFds, received: tuple[int, ...]) -> None:
        """Keep what we want of an answer and close the rest of its descriptors.

        Raises ProtocolError if it names a descriptor that did not come, and
        InvalidError if one is no eventfd.
        """
        fds: list[int | None] = list(received)
        try:
            for sub in answer.subregions:
                self._keep(answer.region, sub, fds)
        finally:
            close_all(fd for fd in fds if fd is not None)

    def _keep(self, bar: int, sub: SubRegion, fds: list[int | None]) -> None:
        place = (bar, sub.offset, sub.datamatch)
        matched = sub.flags & IoEventFdFlag.DATAMATCH
        if sub.type != IoFdType.IOEVENTFD or not matched or sub.size != 4:
            return
        if place not in self._wanted or place in self._bells:
            return
        if sub.fd_index >= len(fds):
            raise ProtocolError(f"eventfd number {sub.fd_index} of {len(fds)}")
        fd = fds[sub.fd_index]
        if fd is not None:
            fds[sub.fd_index] = None
            self._bells[place] = Doorbell.adopt(fd)

    def close(self) -> None:
        """Close all; what comes from now on is not wanted."""
        for bell in self._bells.values():
            bell.close()
        self._bells.clear()
        self._wanted.clear()
