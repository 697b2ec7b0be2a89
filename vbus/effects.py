"""What a bridge asks of the world around it: tasks. It never awaits itself.

The daemon implements this with a nursery; `vbus.testing` records it.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from shm import Doorbell
from vbus.connection import Connection, Ended


class BridgeEffects(Protocol):
    """Where the effects of one guest's bridge go."""

    def connection_opened(self, connection: Connection) -> None:
        """Start `connection.device.run(connection)`.

        An exception it ends with goes to `Bridge.connection_failed`.
        """
        ...

    def connection_closed(self, connection: Connection, reason: Ended) -> None:
        """Cancel that task, at once and without waiting for it."""
        ...

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        """Await `work()` in a task; it has a deadline and logs its own errors."""
        ...

    def watch(self, doorbell: Doorbell, rung: Callable[[], object]) -> None:
        """Call `rung` whenever the doorbell was rung, until `unwatch`."""
        ...

    def unwatch(self, doorbell: Doorbell) -> None:
        """Stop watching; the doorbell is closed next."""
        ...
