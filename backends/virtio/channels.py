"""What a console port is connected to: a pseudo-terminal, a Unix socket or a log file.

Output that nobody is there for is dropped and counted, as on a serial line; a reader
who is there and slow holds up only this port.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final, Protocol

import trio

from vbus.errors import ExistsError, InvalidError, VbusError
from vbus.pty import Pty
from vbus.sockets import remove_stale

_CHUNK: Final = 4096


class Channel(Protocol):
    """Bytes both ways."""

    dropped: int
    """Bytes of output nobody was there for."""

    async def receive(self) -> bytes:
        """Wait for input."""
        ...

    async def send(self, data: bytes) -> None:
        """Put all of it out."""
        ...

    def send_now(self, data: bytes) -> None:
        """Put out what can be put out without waiting."""
        ...

    def close(self) -> None:
        """Let go of what it is connected to."""
        ...


class LogFile:
    """Appends to a file; there is no input."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises InvalidError."""
        self.dropped = 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o640)
        except OSError as error:
            raise InvalidError(f"{path}: {error.strerror}") from None

    async def receive(self) -> bytes:
        await trio.sleep_forever()
        return b""

    async def send(self, data: bytes) -> None:
        await trio.to_thread.run_sync(self.send_now, data)

    def send_now(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:  # a full disk must not stop the guest
            self.dropped += len(rest)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def forget_dead(path: Path) -> None:
    """Remove the socket of one that was killed; who is isolated cannot find out."""
    with contextlib.suppress(VbusError, OSError):
        remove_stale(path)


class UnixSocket:
    """A listening Unix socket that serves one client after the other."""

    def __init__(self, path: Path) -> None:
        """Listen. Raises ExistsError (somebody listens there), InvalidError."""
        self.dropped = 0
        self.path = path
        self._client: trio.socket.SocketType | None = None
        forget_dead(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(str(path))
            sock.listen(1)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise ExistsError(f"{path} is there already") from None
            raise InvalidError(f"{path}: {error.strerror or error}") from None
        self._listener = trio.socket.from_stdlib_socket(sock)

    async def receive(self) -> bytes:
        while True:
            if self._client is None:
                self._client, _ = await self._listener.accept()
            data = b""
            with contextlib.suppress(OSError):
                data = await self._client.recv(_CHUNK)
            if data:
                return data
            self._drop_client()

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._client is None:
                self.dropped += len(rest)
                await trio.lowlevel.checkpoint()
                return
            try:
                rest = rest[await self._client.send(rest) :]
            except OSError:
                self._drop_client()

    def send_now(self, data: bytes) -> None:
        sent = 0
        if self._client is not None:
            with contextlib.suppress(OSError):
                sent = os.write(self._client.fileno(), data)
        self.dropped += len(data) - sent

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        self._drop_client()
        if self._listener.fileno() >= 0:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


__all__ = ["Channel", "LogFile", "Pty", "UnixSocket", "forget_dead"]
