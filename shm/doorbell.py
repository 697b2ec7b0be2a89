"""Doorbells: one eventfd, rung by one process and awaited by another.

A doorbell carries no data, only "look again". Its counter may be written and read by
the peer at any time, so neither ringing nor waiting may depend on what it holds.
"""

import contextlib
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import trio

from shm._core import eventfd_signal
from shm.errors import InvalidError

_EVENTFD_LINK = "anon_inode:[eventfd]"


@dataclass(frozen=True)
class DoorbellStatistics:
    """`rings` by us, `wakes` of `wait` (a wake may stand for many rings)."""

    rings: int
    wakes: int


class Doorbell:
    """An eventfd with an owner. Close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._own(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Take ownership of a received fd; closed and `InvalidError` if no eventfd."""
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != _EVENTFD_LINK:
                raise InvalidError(f"fd {fd} is not an eventfd")
            os.set_blocking(fd, False)
        except BaseException:
            os.close(fd)
            raise
        self = cls.__new__(cls)
        self._own(fd)
        return self

    def _own(self, fd: int) -> None:
        self._fd = fd
        self._count = bytearray(8)
        self._rings = 0
        self._wakes = 0

    def fileno(self) -> int:
        """The fd, still owned by the doorbell; -1 once closed."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def ring(self) -> None:
        """Wake the other end. Never blocks: a full counter wakes as well."""
        eventfd_signal(self._fd)
        self._rings += 1

    def drain(self) -> int:
        """Take what was rung so far: the count, 0 if nothing. Never blocks."""
        try:
            # Not a plain read: the peer shares the file's flags and may have made it
            # blocking again.
            os.preadv(self._fd, [self._count], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        return int.from_bytes(self._count, "little")

    async def wait(self) -> int:
        """Wait until rung; drains, and returns the count.

        A checkpoint. Cancelled, it has taken nothing. `trio.ClosedResourceError`
        once closed, for a task that already waits too.
        """
        while True:
            if self._fd < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._fd)
            count = self.drain()
            if count:
                self._wakes += 1
                return count

    def statistics(self) -> DoorbellStatistics:
        """A snapshot of the counters."""
        return DoorbellStatistics(self._rings, self._wakes)

    def close(self) -> None:
        """Close the fd; tasks in `wait` get `trio.ClosedResourceError`. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(RuntimeError):  # no trio run, so no task waits
            trio.lowlevel.notify_closing(fd)
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
