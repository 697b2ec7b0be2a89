"""A process that may have to go: held by a pidfd, so that no other is ever meant."""

import os
import select
import signal
import socket
from contextlib import suppress

import trio

from vbus.sockets import peer_of

_SO_PEERPIDFD = 77
_ORDERLY_S = 1.0
_KILLED_S = 5.0


class Process:
    """A process by its pidfd, which this owns; without one there is nothing to do."""

    def __init__(self, pid: int, fd: int | None) -> None:
        self.pid = pid
        self._fd = fd

    @classmethod
    def child(cls, pid: int) -> "Process":
        """Hold a child that nobody has waited for yet."""
        return cls(pid, os.pidfd_open(pid))

    @classmethod
    def peer(cls, sock: socket.socket) -> "Process":
        """Hold who connected; not ourselves, nor who is out of sight."""
        pid = peer_of(sock).pid
        if pid in (0, os.getpid()):
            return cls(pid, None)
        try:
            fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:  # before Linux 6.5, or it is gone
            fd = None
        with suppress(OSError):
            fd = os.pidfd_open(pid) if fd is None else fd
        return cls(pid, fd)

    @property
    def gone(self) -> bool:
        """Has it ended?"""
        if self._fd is None:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    async def end(self, *, orderly: bool) -> bool:
        """See it end: by itself if `orderly`, else by SIGKILL. Not cancellable.

        Returns False if even that did not end it (it is stuck in the kernel).
        """
        with trio.CancelScope(shield=True):
            if orderly and await self._ends(_ORDERLY_S):
                return True
            self.kill()
            await self._ends(_KILLED_S)
        return self.gone

    def kill(self) -> None:
        """SIGKILL, which a stopped process cannot escape either."""
        if self._fd is not None:
            with suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    async def _ends(self, within_s: float) -> bool:
        if not self.gone and self._fd is not None:
            with trio.move_on_after(within_s):
                await trio.lowlevel.wait_readable(self._fd)
        return self.gone

    def close(self) -> None:
        """Let go of it; safe to repeat."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
