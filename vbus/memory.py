"""Guest memory that other processes map as well: it follows the guest's maps there.

The daemon's own mapping changes at once, those of the mirrors soon after. Until then
`fence` says so, and whoever wants to tell the guest that something of it is no longer
used has to wait for it first.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from shm import AddressSpace
from vbus.errors import NoSpaceError
from vbus.saved import Held, Kept, SavedRange


@dataclass(frozen=True, slots=True)
class Mapped:
    """A range of guest addresses with memory behind it; the descriptor is ours."""

    addr: int
    size: int
    fd: int
    offset: int
    writable: bool
    truncatable: bool


class Mirror(Protocol):
    """Another process that maps the same memory."""

    def mapped(self, range: Mapped) -> None:
        """Map this as well."""
        ...

    def unmapped(self, addr: int, size: int) -> None:
        """Unmap what lies in there; it calls `GuestMemory.retracting`."""
        ...


class GuestMemory(AddressSpace):
    """A guest's memory with mirrors; it keeps a descriptor of each range for them."""

    def __init__(self) -> None:
        self._ranges: dict[int, Mapped] = {}
        self._mirrors: list[Mirror] = []
        self._retracting: set[trio.Event] = set()

    def map(
        self,
        addr: int,
        size: int,
        fd: int | None,
        offset: int = 0,
        *,
        writable: bool = True,
        allow_truncatable: bool = False,
    ) -> None:
        """See AddressSpace.map."""
        super().map(
            addr,
            size,
            fd,
            offset,
            writable=writable,
            allow_truncatable=allow_truncatable,
        )
        if fd is None:
            return
        try:
            kept = os.dup(fd)
        except OSError as error:
            super().unmap(addr, size)
            raise NoSpaceError(f"no descriptor to keep: {error.strerror}") from None
        range = Mapped(addr, size, kept, offset, writable, allow_truncatable)
        self._ranges[addr] = range
        for mirror in tuple(self._mirrors):
            mirror.mapped(range)

    def unmap(self, addr: int, size: int, /) -> int:
        """See AddressSpace.unmap."""
        removed = super().unmap(addr, size)
        if removed:
            self._forget(addr, size)
        return removed

    def clear(self) -> None:
        """Unmap everything."""
        super().clear()
        self._forget(0, 1 << 64)

    def _forget(self, addr: int, size: int) -> None:
        gone = [
            range
            for range in self._ranges.values()
            if addr <= range.addr and range.addr + range.size <= addr + size
        ]
        for range in gone:
            os.close(self._ranges.pop(range.addr).fd)
        if gone:
            for mirror in tuple(self._mirrors):
                mirror.unmapped(addr, size)

    def save(self, kept: Kept) -> tuple[SavedRange, ...]:
        """Give all that is mapped, for `resume`."""
        backed = [
            SavedRange(
                one.addr,
                one.size,
                one.offset,
                one.writable,
                one.truncatable,
                kept.keep(one.fd),
            )
            for one in self._ranges.values()
        ]
        bare = [
            SavedRange(one.addr, one.size, 0, one.writable, False, None)
            for one in self.regions()
            if not one.backed
        ]
        return (*backed, *bare)

    def resume(self, saved: Sequence[SavedRange], held: Held) -> None:
        """Map what another one had. Raises as `map`."""
        for one in saved:
            fd = None if one.fd is None else held.take(one.fd)
            try:
                self.map(
                    one.addr,
                    one.size,
                    fd,
                    one.offset,
                    writable=one.writable,
                    allow_truncatable=one.truncatable,
                )
            finally:
                if fd is not None:
                    os.close(fd)

    # For mirrors

    def ranges(self) -> list[Mapped]:
        """All that has memory behind it."""
        return list(self._ranges.values())

    def attach(self, mirror: Mirror) -> None:
        """Tell `mirror` of every change from now on."""
        self._mirrors.append(mirror)

    def detach(self, mirror: Mirror) -> None:
        """Tell it nothing any more."""
        self._mirrors.remove(mirror)

    def retracting(self) -> Callable[[], None]:
        """Note that a process has yet to let go; call the result when it did."""
        event = trio.Event()
        self._retracting.add(event)

        def done() -> None:
            self._retracting.discard(event)
            event.set()

        return done

    def fence(self) -> Callable[[], Awaitable[object]] | None:
        """Give what waits until all that is being let go of now is; None if it is."""
        if not self._retracting:
            return None
        events = tuple(self._retracting)

        async def settled() -> None:
            for event in events:
                await event.wait()

        return settled
