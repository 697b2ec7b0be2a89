"""A pseudo-terminal whose other side is somebody's terminal, or nobody's."""

import contextlib
import errno
import os
import select
import tty
from pathlib import Path
from typing import Final

import trio

_CHUNK: Final = 4096
_LOOK_S: Final = 0.2
"""How often to look whether somebody opened the terminal: the kernel does not tell."""


class Pty:
    """A pseudo-terminal in raw mode; open `path` to be the terminal.

    Output while nobody has it open is dropped and counted, as on a serial line.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._fd, other = os.openpty()
        try:
            tty.setraw(other)
            self.path = Path(os.ttyname(other))
            os.set_blocking(self._fd, False)
        finally:
            os.close(other)  # from now on reading fails while nobody has it open

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.checkpoint()
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                await trio.sleep(_LOOK_S)
            else:
                return data

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            await trio.lowlevel.checkpoint()
            if not self._somebody():
                self.dropped += len(rest)
                return
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._fd)

    def send_now(self, data: bytes) -> None:
        sent = 0
        if self._somebody():
            with contextlib.suppress(BlockingIOError):
                sent = os.write(self._fd, data)
        self.dropped += len(data) - sent

    def _somebody(self) -> bool:
        look = select.poll()
        look.register(self._fd, select.POLLOUT)
        return not any(events & select.POLLHUP for _, events in look.poll(0))

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(RuntimeError):  # no trio run, so no task waits
                trio.lowlevel.notify_closing(fd)
            os.close(fd)
