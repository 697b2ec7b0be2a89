"""A host process as a guest: its memory, its connection, its bridge, all at once."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from proxy.bridge import BridgeDriver
from proxy.memory import DmaMemory
from proxy.tasks import beside
from proxy.vfio_user import SPIN_US, connect

MEMORY_MIB = 64


@asynccontextmanager
async def attach(
    path: str | os.PathLike[str],
    *,
    memory_mib: int = MEMORY_MIB,
    compat: bool = False,
    spin_us: float = SPIN_US,
) -> AsyncIterator[BridgeDriver]:
    """Be a guest of the bridge served at `path`, for the time of the body.

    With `compat` nothing beyond the original protocol is asked for. If the host goes,
    the body is cancelled and NoDeviceError raised. Leaving closes what is open.
    Raises UnreachableError, BusyError if another guest is attached, or another
    VbusError if the host refuses.
    """
    with DmaMemory(memory_mib << 20) as memory:
        async with connect(path, memory, spin_us=spin_us) as function:
            bridge = BridgeDriver(function, compat=compat)
            try:
                await bridge.attach()
                async with beside(bridge.run):
                    yield bridge
            finally:
                with trio.CancelScope(shield=True):
                    await bridge.detach()
