"""The effects of a guest's bridge as trio tasks: where devices' coroutines run."""

from collections.abc import Awaitable, Callable

import trio

from shm import Doorbell
from vbus.connection import Connection, Ended
from vbus.logs import about


class BridgeTasks:
    """Runs what a bridge asks for in `nursery`, which must outlive the bridge.

    Set `failed` to the bridge's `connection_failed` before a guest attaches: it gets
    the exception that ended a device's `run`.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.failed: Callable[[Connection, Exception], object] = lambda *_: None
        self.running: dict[Connection, trio.CancelScope] = {}
        self._watchers: dict[Doorbell, trio.CancelScope] = {}
        self._nursery = nursery

    def connection_opened(self, connection: Connection) -> None:
        if connection.device.overrides("run"):
            scope = self.running[connection] = trio.CancelScope()
            self._nursery.start_soon(self._run, connection, scope)

    def connection_closed(self, connection: Connection, reason: Ended) -> None:
        if connection in self.running:
            self.running[connection].cancel()

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        self._nursery.start_soon(work)

    def watch(self, doorbell: Doorbell, rung: Callable[[], object]) -> None:
        scope = self._watchers[doorbell] = trio.CancelScope()
        self._nursery.start_soon(self._watch, doorbell, rung, scope)

    def unwatch(self, doorbell: Doorbell) -> None:
        self._watchers.pop(doorbell).cancel()

    async def _run(self, connection: Connection, scope: trio.CancelScope) -> None:
        with about(device=connection.device.name):
            await self._run_bound(connection, scope)

    async def _run_bound(self, connection: Connection, scope: trio.CancelScope) -> None:
        try:
            with scope:
                # The end may come before the task's first step.
                await trio.lowlevel.checkpoint_if_cancelled()
                await connection.device.run(connection)
        except Exception as error:
            # Once it is closed, whatever the task ran into is the end of the closed.
            if not scope.cancel_called:
                self.failed(connection, error)
        finally:
            del self.running[connection]

    async def _watch(
        self, doorbell: Doorbell, rung: Callable[[], object], scope: trio.CancelScope
    ) -> None:
        with scope:
            await trio.lowlevel.checkpoint_if_cancelled()
            while True:
                await doorbell.wait()
                rung()
