"""Be a guest: memory, a function, its bridge, all at once.

A process of the host attaches to a socket; a system in a virtual machine to the PCI
function it finds there.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from proxy.bridge import BridgeDriver
from proxy.linux.function import choose, is_address, open_function
from proxy.memory import DmaMemory
from proxy.pci import PciFunction
from proxy.tasks import beside
from proxy.vfio_user import SPIN_US, connect

MEMORY_MIB = 64

Say = Callable[[str], object]


@asynccontextmanager
async def attach(
    where: str | os.PathLike[str] | None = None,
    *,
    memory_mib: int = MEMORY_MIB,
    compat: bool = False,
    spin_us: float = SPIN_US,
    say: Say = lambda _: None,
) -> AsyncIterator[BridgeDriver]:
    """Be a guest of a bridge, for the time of the body.

    `where` is the path of a socket, or the PCI address of the bridge in this virtual
    machine, or None for the only one there is. With `compat` nothing beyond the
    original protocol is asked for. `say` is told how the function was reached.

    If the host goes, the body is cancelled and NoDeviceError raised. Leaving closes
    what is open. Raises UnreachableError, NotFoundError if there is no bridge,
    BusyError if another guest is attached, or another VbusError if the host refuses.
    """
    async with _function(where, memory_mib << 20, spin_us, say) as function:
        bridge = BridgeDriver(function, compat=compat)
        try:
            await bridge.attach()
            async with beside(bridge.run):
                yield bridge
        finally:
            with trio.CancelScope(shield=True):
                await bridge.detach()


def _function(
    where: str | os.PathLike[str] | None, size: int, spin_us: float, say: Say
) -> AbstractAsyncContextManager[PciFunction]:
    if where is None or is_address(os.fspath(where)):
        address = None if where is None else os.fspath(where)
        return open_function(choose(address), size, say)
    return _connected(where, size, spin_us)


@asynccontextmanager
async def _connected(
    path: str | os.PathLike[str], size: int, spin_us: float
) -> AsyncIterator[PciFunction]:
    with DmaMemory(size) as memory:
        async with connect(path, memory, spin_us=spin_us) as function:
            yield function
