"""A device of the daemon that is a PCI function of its own, behind a vfio-user socket.

What `Guest` is for a bridge; the function is the device's own (`Device.pci_function`).
"""

from pathlib import Path

import trio

from vbus.config import Exposure
from vbus.device import Device
from vbus.sockets import Listeners
from vbus.vfio_user.server import VfioUserServer


class ExposedDevice:
    """A device's function, shown until `remove`."""

    def __init__(
        self,
        device: Device,
        config: Exposure,
        path: Path,
        listeners: Listeners | None = None,
    ) -> None:
        """Make the function. Raises InvalidError: no such layout, or none at all."""
        self.device = device
        self.config = config
        self.path = path
        self.listening = False
        """Its socket is or was there: `serve` has started."""
        self.function = device.pci_function(config.layout, spin_us=config.spin_us)
        self.server = VfioUserServer(
            self.function,
            path,
            name=device.name,
            owner_uid=config.uid,
            listeners=listeners,
        )
        self._scope = trio.CancelScope()
        self._gone = trio.Event()

    @property
    def name(self) -> str:
        return self.device.name

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled or removed. Raises what the socket refuses."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.server.serve)
                    self.listening = True
                    task_status.started()
        finally:
            self.function.close()
            self._gone.set()

    def end(self) -> None:
        """End `serve`, soon."""
        self._scope.cancel()

    async def remove(self) -> None:
        """End `serve` and wait for it."""
        self.end()
        await self._gone.wait()
