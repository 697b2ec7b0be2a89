"""One process that the daemon started for a backend: it waits, works, and ends.

started --Hello--> waits --its turn--> works --> ended
   +------------------+------------------------->
"""

import logging
import subprocess

import trio

from vbus.backend import wire
from vbus.backend.backend import Backend
from vbus.backend.link import BackendLink

log = logging.getLogger(__name__)


class Child:
    """A process, from its start to its end. `run` it once."""

    def __init__(
        self, backend: Backend, link: BackendLink, process: "subprocess.Popen[bytes]"
    ) -> None:
        self.turn = trio.Event()
        """Set it to let the process work for the backend."""
        self.greeted = trio.Event()
        """It said hello, or ended before."""
        self.settled = trio.Event()
        """It works, or ended before."""
        self.ended = trio.Event()
        self.reason = ""
        self._backend = backend
        self._link = link
        self._process = process

    async def run(self) -> None:
        """Serve it until it has ended."""
        try:
            self.reason = await self._link.serve(self._up, self._backend.device_failed)
        finally:
            status = self._process.poll()  # it is dead already
            self.reason = f"{self.reason} (status {status})"
            self._backend.went_down(self._link, self.reason)
            if self.turn.is_set():
                self._backend.last_end = self.reason
            elif self._backend.standby == self._link.process.pid:
                self._backend.standby = None
            for event in (self.greeted, self.settled, self.ended):
                event.set()
        log.warning("backend %s ended: %s", self._backend.name, self.reason)

    async def _up(self, hello: wire.Hello) -> None:
        self.greeted.set()
        self._backend.standby = self._link.process.pid
        await self.turn.wait()
        self._backend.standby = None
        await self._backend.came_up(self._link, hello)
        self.settled.set()

    def kill(self) -> None:
        """End it; `ended` tells when it has."""
        self._link.process.kill()
