"""Where the effects of a bridge go in tests: into lists, or into a nursery."""

from collections.abc import Awaitable, Callable

import trio

from shm import Doorbell
from vbus.connection import Connection, Ended
from vbus.tasks import BridgeTasks


class RecordedEffects:
    """Records what a bridge asks for, and does nothing by itself."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.closed: list[tuple[Connection, Ended]] = []
        self.spawned: list[Callable[[], Awaitable[object]]] = []
        self.watched: dict[Doorbell, Callable[[], object]] = {}

    def connection_opened(self, connection: Connection) -> None:
        self.opened.append(connection)

    def connection_closed(self, connection: Connection, reason: Ended) -> None:
        assert connection in self.opened
        assert connection not in [known for known, _ in self.closed]
        self.closed.append((connection, reason))

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        self.spawned.append(work)

    def watch(self, doorbell: Doorbell, rung: Callable[[], object]) -> None:
        assert doorbell not in self.watched
        self.watched[doorbell] = rung

    def unwatch(self, doorbell: Doorbell) -> None:
        del self.watched[doorbell]

    def answer_doorbells(self) -> int:
        """Do what a watching task would: call `rung` of each doorbell that was rung."""
        rung = [call for bell, call in self.watched.items() if bell.drain()]
        for call in rung:
            call()
        return len(rung)

    async def run_spawned(self) -> None:
        """Await all work that was spawned."""
        while self.spawned:
            await self.spawned.pop(0)()


class NurseryEffects(RecordedEffects):
    """Records, and runs the tasks of devices as the daemon does (`BridgeTasks`).

    `failures` holds the exceptions that ended a device's `run`; set `failed` to tell
    the bridge (`Bridge.connection_failed`).
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__()
        self.failures: list[tuple[Connection, Exception]] = []
        self.failed: Callable[[Connection, BaseException], object] = lambda *_: None
        self._tasks = BridgeTasks(nursery)
        self._tasks.failed = self._run_failed

    @property
    def running(self) -> dict[Connection, trio.CancelScope]:
        """The connections whose `run` has not ended."""
        return self._tasks.running

    def connection_opened(self, connection: Connection) -> None:
        super().connection_opened(connection)
        self._tasks.connection_opened(connection)

    def connection_closed(self, connection: Connection, reason: Ended) -> None:
        super().connection_closed(connection, reason)
        self._tasks.connection_closed(connection, reason)

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        self._tasks.spawn(work)

    def watch(self, doorbell: Doorbell, rung: Callable[[], object]) -> None:
        super().watch(doorbell, rung)
        self._tasks.watch(doorbell, rung)

    def unwatch(self, doorbell: Doorbell) -> None:
        super().unwatch(doorbell)
        self._tasks.unwatch(doorbell)

    def _run_failed(self, connection: Connection, error: Exception) -> None:
        self.failures.append((connection, error))
        self.failed(connection, error)
