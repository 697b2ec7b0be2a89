"""A real host in this process: buses, bridges, and their vfio-user servers."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from backends.echo import Echo
from vbus.bridge import Bridge
from vbus.bus import Bus, BusModel
from vbus.device import Device
from vbus.testing import NurseryEffects
from vbus.vfio_user.server import VfioUserServer

BUS = "bus0"


class Host:
    """One bus, and guests that each have a socket and a bridge onto it."""

    def __init__(
        self, nursery: trio.Nursery, folder: Path, classes: Mapping[str, type[Device]]
    ) -> None:
        self.model = BusModel(classes)
        self.bridges: dict[str, Bridge] = {}
        self.servers: dict[str, VfioUserServer] = {}
        self._nursery = nursery
        self._folder = folder
        self._scopes: dict[str, trio.CancelScope] = {}

    async def add_guest(
        self,
        name: str = "g1",
        *,
        bus: str = BUS,
        msix: bool = True,
        call_timeout_s: float = 5.0,
        spin_us: float = 0,
    ) -> Path:
        """Serve a bridge for one guest; give the path of its socket."""
        effects = NurseryEffects(self._nursery)
        bridge = Bridge(
            self._bus(bus),
            effects,
            name=name,
            msix=msix,
            call_timeout_s=call_timeout_s,
        )
        effects.failed = bridge.connection_failed
        path = self._folder / f"{name}.sock"
        server = VfioUserServer(bridge, path, name=name, spin_us=spin_us)
        self.bridges[name], self.servers[name] = bridge, server
        await self._nursery.start(self._serve, name, server)
        return path

    async def _serve(
        self, name: str, server: VfioUserServer, task_status: trio.TaskStatus[None]
    ) -> None:
        with trio.CancelScope() as self._scopes[name]:
            await server.serve(task_status=task_status)

    def stop(self, name: str = "g1") -> None:
        """Let the server of a guest die."""
        self._scopes[name].cancel()

    def _bus(self, name: str) -> Bus:
        return self.model.buses.get(name) or self.model.add_bus(name)

    def add(
        self,
        name: str,
        class_name: str = "echo",
        *,
        bus: str = BUS,
        **attributes: object,
    ) -> Device:
        """Make a device and put it on the bus."""
        device = self.model.add_device(name, class_name, attributes)
        if device.overrides("serve"):
            self._nursery.start_soon(device.serve)
        if device.type:
            self.model.link(self._bus(bus).name, name)
        return device

    def drop(self, name: str) -> None:
        """Take a device away while guests use it."""
        self.model.remove_device(name)

    def close(self) -> None:
        for bridge in self.bridges.values():
            bridge.close()
        for device in self.model.devices.values():
            device.teardown()


@asynccontextmanager
async def hosted(
    folder: Path, classes: Mapping[str, type[Device]] | None = None
) -> AsyncIterator[Host]:
    """Run a host for the time of the body; errors of its tasks come out in a group."""
    async with trio.open_nursery() as nursery:
        host = Host(nursery, folder, {"echo": Echo, **(classes or {})})
        try:
            yield host
        finally:
            nursery.cancel_scope.cancel()
            host.close()


async def until(condition: Callable[[], object], *, within_s: float = 10) -> None:
    """Let all other tasks run until a condition of the test holds."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))
