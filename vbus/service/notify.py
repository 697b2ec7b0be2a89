"""Telling the service manager how it goes: sd_notify(3), without its library.

Each message is one datagram to the socket that $NOTIFY_SOCKET names. It is connected
once, so that it still works when sockets can no longer be made (`vbus.isolation`).
"""

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

import trio

from vbus.errors import ConfigError

logger = logging.getLogger(__name__)

_MOST_STATUS = 1024


@dataclass(frozen=True)
class NotifierStatistics:
    """Messages that the manager took, and those that were lost on the way."""

    sent: int
    lost: int


class Notifier:
    """A connection to the manager, or to nobody: then every method does nothing.

    It owns its socket; `close` it.
    """

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """Connect to a path, or to an abstract name that begins with "@".

        `watchdog_s` is how long the manager waits for a sign of life. Raises
        ConfigError for an address that is neither, and OSError.
        """
        self.watchdog_s = watchdog_s
        self.environment: dict[str, str] = {}
        """What `from_environment` took, for who executes this process anew."""
        self._sent = self._lost = 0
        self._socket: socket.socket | None = None
        if not address:
            return
        if address[0] not in "/@":
            raise ConfigError(f"NOTIFY_SOCKET: {address!r} is no address of a socket")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # The manager may be slow; the bus does not wait for it.
            self._socket.setblocking(False)
            path = "\0" + address[1:] if address[0] == "@" else address
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> "Notifier":
        """Take the manager's variables out of `environment`: they are for us alone.

        Raises ConfigError for values that mean nothing, and OSError.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        usec = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        try:
            ours = not pid or int(pid) == os.getpid()
            watchdog_s = int(usec) / 1e6 if usec and ours else None
        except ValueError:
            raise ConfigError(f"WATCHDOG_USEC={usec!r} WATCHDOG_PID={pid!r}") from None
        if watchdog_s is not None and watchdog_s <= 0:
            raise ConfigError(f"WATCHDOG_USEC={usec!r} WATCHDOG_PID={pid!r}")
        notifier = cls(address, watchdog_s)
        taken = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}
        notifier.environment = {key: one for key, one in taken.items() if one}
        return notifier

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def ready(self) -> None:
        """Everything is there; the manager starts what waits for us."""
        self._send("READY=1")

    def reloading(self) -> None:
        """It starts anew within this process, and says READY once more."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={usec}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=Stopping.")

    def status(self, line: str) -> None:
        """Say in one line for `systemctl status` how it goes."""
        self._send("STATUS=" + " ".join(line.split())[:_MOST_STATUS])

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def store(self, name: str, *fds: int) -> None:
        """Leave descriptors with the manager, which gives them to our successor.

        The name has no colons and no control characters; descriptors of one name add
        up. The manager may have no room (FileDescriptorStoreMax=), and does not say.
        """
        self._send(f"FDSTORE=1\nFDNAME={_checked(name)}", fds)

    def forget(self, name: str) -> None:
        """Let the manager close what it has by that name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")

    async def keep_alive(self) -> None:
        """Say every half of the watchdog's time that the loop turns, for ever.

        Being a task among the others is the point: it is silent when they are stuck.
        """
        if self.watchdog_s is None:
            return
        while True:
            self.alive()
            await trio.sleep(self.watchdog_s / 2)

    def statistics(self) -> NotifierStatistics:
        return NotifierStatistics(self._sent, self._lost)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str, fds: tuple[int, ...] = ()) -> None:
        if self._socket is None:
            return
        try:
            socket.send_fds(self._socket, [message.encode()], list(fds))
        except OSError as error:
            self._lost += 1
            logger.warning("the service manager was not told %r: %s", message, error)
        else:
            self._sent += 1


def _checked(name: str) -> str:
    if not name.isprintable() or not name.isascii() or ":" in name or len(name) > 255:
        raise ValueError(f"no name for a descriptor: {name!r}")
    return name
