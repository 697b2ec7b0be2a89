"""The memory of one guest in a backend's process, following the guest's maps there."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vbus.backend import wire
from vbus.memory import GuestMemory, Mapped

if TYPE_CHECKING:
    from vbus.backend.link import BackendLink

log = logging.getLogger(__name__)


class Mirror:
    """The memory of one guest over there, as long as it has something open."""

    def __init__(
        self, link: "BackendLink", number: int, guest: str, memory: GuestMemory
    ) -> None:
        self.number = number
        self.users = 0
        self.memory = memory
        self._link = link
        self._guest = guest
        ranges = memory.ranges()
        for start in range(0, len(ranges) or 1, wire.MAX_FDS):
            self._map(ranges[start : start + wire.MAX_FDS])
        memory.attach(self)

    def mapped(self, range: Mapped) -> None:
        self._map([range])

    def _map(self, ranges: Sequence[Mapped]) -> None:
        said = tuple(
            wire.Range(one.addr, one.size, one.offset, one.writable, one.truncatable)
            for one in ranges
        )
        self._link.request(
            lambda id: wire.Map(id, self.number, self._guest, said),
            self._was_mapped,
            [one.fd for one in ranges],
        )

    def _was_mapped(self, reply: wire.Reply | None) -> None:
        if reply is not None and reply.result < 0:
            log.warning("%s cannot map memory: %s", self._link.name, reply.message)

    def unmapped(self, addr: int, size: int) -> None:
        done = self.memory.retracting()
        number = self.number
        if size >> 64:
            self._link.request(lambda id: wire.Forget(id, number), lambda _: done())
        else:
            self._link.request(
                lambda id: wire.Unmap(id, number, addr, size), lambda _: done()
            )

    def end(self) -> None:
        """Have all of it unmapped there."""
        self.detach()
        self.unmapped(0, 1 << 64)

    def detach(self) -> None:
        """Follow the guest's maps no more."""
        self.memory.detach(self)
