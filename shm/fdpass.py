"""File descriptors over unix sockets: each one received ends in an owner, or closed."""

import array
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import trio

from shm.errors import InvalidError

_INT_SIZE = array.array("i").itemsize


class ReceivedFds:
    """Fds that came with a message; `take` hands one over, `close` ends the rest."""

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self._fds: list[int] = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> int:
        """The next fd, which is the caller's from here on; `InvalidError` if none."""
        if not self._fds:
            raise InvalidError("the message should have brought another fd")
        return self._fds.pop(0)

    def add(self, more: "ReceivedFds") -> None:
        """Own those of `more` too."""
        self._fds += more._fds
        more._fds = []

    def close(self) -> None:
        """Close what was not taken."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def send_with_fds(
    sock: "trio.socket.SocketType", data: bytes, fds: Sequence[int] = ()
) -> None:
    """Send all of `data`; the fds go with its first byte and stay the caller's.

    Cancelled, part of the message may have gone.
    """
    if fds and not data:
        raise InvalidError("fds need at least one byte to travel with")
    rest = memoryview(data)
    rights = array.array("i", fds).tobytes()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
    while rest:
        sent = await sock.sendmsg([rest], ancillary)
        rest = rest[sent:]
        ancillary = []


async def receive_with_fds(
    sock: "trio.socket.SocketType", limit: int, max_fds: int
) -> tuple[bytes, ReceivedFds]:
    """Receive up to `limit` bytes and the fds that came with them; b"" at the end.

    Close-on-exec is set. More than `max_fds` fds: all are closed, `InvalidError`.
    """
    space = socket.CMSG_SPACE((max_fds + 1) * _INT_SIZE)
    data, ancillary, flags, _ = await sock.recvmsg(
        limit, space, socket.MSG_CMSG_CLOEXEC
    )
    fds = ReceivedFds(_rights(ancillary))
    if len(fds) > max_fds or flags & socket.MSG_CTRUNC:
        fds.close()
        raise InvalidError(f"more than {max_fds} fds came with one message")
    return data, fds


def _rights(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return list(fds)
