"""Virtio devices behind a bridge in this process, and a guest that drives them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from backends.venet import Switch, Venet
from backends.virtio.classes import (
    VirtioBlkDevice,
    VirtioConsoleDevice,
    VirtioNetDevice,
    VirtioRngDevice,
)
from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy
from proxy.guest import attach
from proxy.tasks import beside
from proxy.virtio.adapter import BusTransport
from proxy.virtio.device import VirtioDevice
from proxy.virtio.disk import Disk
from tests.proxy.host import Host, hosted

WITHIN_S = 60
CLASSES = {
    "blk": VirtioBlkDevice,
    "console": VirtioConsoleDevice,
    "net": VirtioNetDevice,
    "rng": VirtioRngDevice,
    "switch": Switch,
    "venet": Venet,
}


@asynccontextmanager
async def guest_of(host: Host, name: str = "g1") -> AsyncIterator[BridgeDriver]:
    path = await host.add_guest(name)
    with trio.fail_after(WITHIN_S):
        async with attach(path) as bridge:
            yield bridge


@asynccontextmanager
async def found(bridge: BridgeDriver, name: str) -> AsyncIterator[VirtioDevice]:
    """Open a device and find out what it is."""
    proxy: DeviceProxy = await bridge.device(name)
    async with proxy.opened():
        transport = BusTransport(proxy)
        await transport.watch_config()
        yield VirtioDevice(transport, await transport.identify())


@asynccontextmanager
async def disk_on(
    bridge: BridgeDriver, name: str = "disk0", *, packed: bool = False
) -> AsyncIterator[Disk]:
    async with found(bridge, name) as device:
        disk = Disk(device)
        await disk.start(packed=packed)
        async with beside(disk.run):
            yield disk


@asynccontextmanager
async def disk_of(
    folder: Path, *, packed: bool = False, **attributes: object
) -> AsyncIterator[tuple[Host, Disk]]:
    """A host with disk0, 4 MiB unless said otherwise, and a guest that has it."""
    about = {"path": str(folder / "disk"), "size": "4M"} | attributes
    async with hosted(folder, CLASSES) as host:
        host.add("disk0", "blk", **about)
        async with guest_of(host) as bridge, disk_on(bridge, packed=packed) as disk:
            yield host, disk
