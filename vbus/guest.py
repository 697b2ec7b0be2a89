"""One guest of the daemon: a bridge onto its bus, behind a vfio-user socket.

Joins the pure bridge with the server and with the tasks of the devices it has open. The
socket and all tasks belong to `serve`, and end with it.
"""

from collections.abc import Callable
from pathlib import Path

import trio

from vbus.bridge import Bridge
from vbus.bus import Bus
from vbus.config import GuestConfig
from vbus.effects import BridgeEffects
from vbus.logs import about
from vbus.pci.function import InterruptSink
from vbus.saved import Held, SavedClient
from vbus.sockets import Listeners
from vbus.tasks import BridgeTasks
from vbus.trace import NO_TRACE, Trace
from vbus.vfio_user.server import VfioUserServer


class _ToldBridge(Bridge):
    """A bridge that tells when its guest comes and goes."""

    def __init__(
        self,
        bus: Bus,
        effects: BridgeEffects,
        config: GuestConfig,
        tell: Callable[[str], object],
        trace: Trace,
    ) -> None:
        self._tell = tell
        super().__init__(
            bus,
            effects,
            name=config.name,
            msix=config.msix,
            call_timeout_s=config.call_timeout_s,
            trace=trace,
        )

    def attach(self, interrupts: InterruptSink) -> None:
        super().attach(interrupts)
        self._tell("guest-attached")

    def detach(self) -> None:
        was_attached = self.attached
        super().detach()
        if was_attached:
            self._tell("guest-left")


class Guest:
    """A guest that may attach; `bridge` and `server` are there once it is served."""

    bridge: Bridge
    server: VfioUserServer

    def __init__(
        self,
        config: GuestConfig,
        bus: Bus,
        path: Path,
        tell: Callable[[str], object] = lambda _: None,
        trace: Trace = NO_TRACE,
        listeners: Listeners | None = None,
        resumed: SavedClient | None = None,
        held: Held | None = None,
    ) -> None:
        """Describe it; `tell` gets "guest-attached" and "guest-left".

        A client that is `resumed` is attached from the start.
        """
        self.config = config
        self.bus = bus
        self.path = path
        self.listening = False
        """Its socket is or was there: `serve` has started."""
        self._tell = tell
        self._trace = trace
        self._listeners = listeners
        self._resumed = resumed
        self._held = held
        self._scope = trio.CancelScope()
        self._gone = trio.Event()

    @property
    def name(self) -> str:
        return self.config.name

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled or removed. Raises what the socket refuses."""
        try:
            with self._scope, about(guest=self.name, bus=self.bus.name):
                async with trio.open_nursery() as nursery:
                    await self._serve(nursery, task_status)
        finally:
            self._gone.set()

    async def remove(self) -> None:
        """End `serve` and wait for it."""
        self._scope.cancel()
        await self._gone.wait()

    async def _serve(
        self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]
    ) -> None:
        tasks = BridgeTasks(nursery)
        self.bridge = _ToldBridge(self.bus, tasks, self.config, self._tell, self._trace)
        tasks.failed = self.bridge.connection_failed
        self.server = VfioUserServer(
            self.bridge,
            self.path,
            name=self.name,
            owner_uid=self.config.uid,
            allow_truncatable=self.config.allow_truncatable,
            spin_us=self.config.spin_us,
            listeners=self._listeners,
            resumed=self._resumed,
            held=self._held,
        )
        self._resumed = self._held = None
        try:
            async with trio.open_nursery() as serving:
                await serving.start(self.server.serve)
                self.listening = True
                task_status.started()
        finally:
            self.bridge.close()
