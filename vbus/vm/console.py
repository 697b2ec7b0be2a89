"""The guest's serial console: kept in a file, and watched for a kernel's last words."""

from collections.abc import Callable
from pathlib import Path

import trio

_RECEIVE_SIZE = 65536
_PANIC = b"Kernel panic - not syncing"
_TAIL_LINES = 15
_KEPT = 8192


class Console:
    """Copies the console to a file; calls `panicked` once if the kernel gives up."""

    def __init__(
        self, sock: trio.socket.SocketType, path: Path, panicked: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._path = path
        self._panicked = panicked
        self._last = b""

    async def run(self) -> None:
        """Copy until QEMU hangs up."""
        told = False
        with self._path.open("wb", buffering=0) as out:
            while True:
                try:
                    data = await self._sock.recv(_RECEIVE_SIZE)
                except OSError:
                    return
                if not data:
                    return
                out.write(data)
                self._last = (self._last + data)[-_KEPT:]
                if not told and _PANIC in self._last:
                    told = True
                    self._panicked()

    def tail(self) -> str:
        """Give where the console is kept, and its last lines."""
        lines = self._last.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        shown = "".join(f"\n  | {line}" for line in lines)
        return f"; the console ({self._path}) says:{shown or ' nothing'}"
