"""A unix stream socket that carries bytes and descriptors, without needless waiting.

Receiving and sending try at once and wait only if the kernel says so, because waking
up costs more than a whole message does. No idea of messages.
"""

import array
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence

import trio

from vbus.errors import ProtocolError

_INT_SIZE = array.array("i").itemsize
_RECEIVE_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT

Received = tuple[bytes, list[int]]


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody has taken."""
    for fd in fds:
        os.close(fd)


class FdSocket:
    """One connected socket; it owns the socket and what is queued to be sent."""

    def __init__(self, sock: socket.socket, max_fds: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        # Room for one more than allowed shows that there were too many.
        self._ancillary_size = socket.CMSG_SPACE((max_fds + 1) * _INT_SIZE)
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued_bytes = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._peer_gone = False

    @property
    def queued_bytes(self) -> int:
        """Bytes the kernel has not taken yet."""
        return self._queued_bytes

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive_nowait(self, limit: int) -> Received | None:
        """Receive what is there: None if nothing, b"" once the peer has left.

        The descriptors are the caller's. Raises ProtocolError if some were lost.
        """
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                limit, self._ancillary_size, _RECEIVE_FLAGS
            )
        except BlockingIOError:
            return None
        except OSError:  # reset: as good as left
            return b"", []
        fds = _rights(ancillary) if ancillary else []
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise ProtocolError("more descriptors came than can be received")
        return data, fds

    async def wait_readable(self) -> None:
        """Wait until there is something to receive. A checkpoint."""
        await trio.lowlevel.wait_readable(self._sock)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send, or queue what the kernel does not take; `run_sender` sends that.

        The descriptors stay the caller's. A peer that has left is no error here: it
        shows on the receiving side.
        """
        if self._peer_gone:
            return
        if not self._queue:
            sent = self._send_now(data, fds)
            if sent == len(data):
                return
            if sent:
                data, fds = data[sent:], ()
        self._queue.append((data, [os.dup(fd) for fd in fds]))
        self._queued_bytes += len(data)
        self._changed.unpark_all()

    def _send_now(self, data: bytes, fds: Sequence[int]) -> int:
        try:
            if not fds:
                return self._sock.send(data, _SEND_FLAGS)
            rights = array.array("i", fds).tobytes()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            return self._sock.sendmsg([data], ancillary, _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError:
            self._forget_queue()
            self._peer_gone = True
            return len(data)

    async def drained(self, limit: int) -> None:
        """Wait until at most `limit` bytes are queued."""
        while self._queued_bytes > limit:
            await self._changed.park()

    async def run_sender(self) -> None:
        """Send what is queued, for ever."""
        while True:
            while not self._queue:
                await self._changed.park()
            await trio.lowlevel.wait_writable(self._sock)
            self._send_queued()
            self._changed.unpark_all()

    def _send_queued(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            sent = self._send_now(data, fds)
            if self._peer_gone or not sent:
                return
            close_all(fds)
            self._queued_bytes -= sent
            if sent < len(data):
                self._queue[0] = (data[sent:], [])
                return
            self._queue.popleft()

    def unsent(self) -> tuple[tuple[bytes, list[int]], ...]:
        """Give what the kernel has not taken yet; all of it stays ours."""
        return tuple(self._queue)

    def send_again(self, data: bytes, fds: list[int]) -> None:
        """Queue what another one could not send; the descriptors are ours now."""
        self._queue.append((data, fds))
        self._queued_bytes += len(data)

    def _forget_queue(self) -> None:
        while self._queue:
            close_all(self._queue.popleft()[1])
        self._queued_bytes = 0

    def close(self) -> None:
        """Close the socket; a task that waits for it gets ClosedResourceError."""
        self._forget_queue()
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


def _rights(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return list(fds)
