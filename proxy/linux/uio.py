"""A PCI function without VFIO: BARs and configuration space through sysfs.

    memory BARs     mapped from resourceN
    I/O BARs        read and written through resourceN
    interrupts      none: the event queues are polled
    DMA memory      huge pages at their physical addresses

The function can reach all memory of the machine: it is trusted. Whoever holds it keeps
/dev/uioN open, so that the kernel ends its bus mastering even if this process is killed
(drivers/uio/uio_pci_generic.c, release).

MSI needs the kernel, and INTx does not work: uio_pci_generic takes an interrupt for
ours only if the status register says so (pci_check_and_mask_intx), but the bridge
pulses its line and has no such bit (ABI 1.3). To the kernel each is spurious, and QEMU
holds the line until a BAR is accessed: one raised by the bridge cost a guest 69,000.
So INTx stays disabled.
"""

import mmap
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Literal

import trio

from proxy.errors import again
from proxy.linux.devices import PciDevice, load_module
from proxy.linux.local import LocalFunction, claimed
from proxy.linux.physical import PhysicalMemory
from proxy.pci import Interrupts
from proxy.tasks import beside
from vbus.errors import (
    InvalidError,
    NoDeviceError,
    PermissionDeniedError,
)
from vbus.pci.constants import Command, Irq, Offset

DRIVER = "uio_pci_generic"
DEV = Path("/dev")
POLL_MIN_S, POLL_MAX_S = 0.001, 0.016
"""How long polling sleeps: the least after something was there, doubled up to the most.

An event waits half of that on average. An idle guest wakes 62 times a second for it,
each time for eight loads from its own memory; the host has no work with it at all.
"""
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class PolledInterrupts(Interrupts):
    """One vector for a function without interrupts: it is asked from time to time."""

    def __init__(self) -> None:
        super().__init__(0)
        self._counts = [0]
        self._period_s = POLL_MIN_S
        self._look: Callable[[], bool] = lambda: True

    def watch(self, look: Callable[[], bool]) -> None:
        self._look = look

    async def wait(self) -> list[int]:
        while True:
            if self._error is not None:
                raise again(self._error)
            with trio.move_on_after(self._period_s):
                # Never readable, but closed by `fail`.
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
            if fired := self.take():
                return fired

    def take(self) -> list[int]:
        if self._error is not None or not self._look():
            self._period_s = min(2 * self._period_s, POLL_MAX_S)
            return []
        self._period_s = POLL_MIN_S
        self._counts[0] += 1
        return [0]


class UioFunction(LocalFunction):
    """The function at `device`, bound to uio_pci_generic. A context manager."""

    def __init__(self, device: PciDevice) -> None:
        """Open it. `memory` comes later. Raises BusyError, NoDeviceError, InvalidError.

        Files first, then memory: a killed process closes them in this order.
        """
        super().__init__(device)
        self._fds: list[int] = []
        self._ports: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._views: dict[tuple[int, int], memoryview] = {}
        try:
            self._config = self._open(device.path / "config")
            self._open(_uio_file(device))
            self._disable_intx()
            self._open_bars()
        except BaseException:
            self._close_files()
            raise

    def _open(self, path: Path) -> int:
        self._fds.append(_open(path))
        return self._fds[-1]

    def _disable_intx(self) -> None:
        command = int.from_bytes(os.pread(self._config, 2, Offset.COMMAND), "little")
        self._put_command(command | Command.INTX_DISABLE)

    def _put_command(self, command: int) -> None:
        os.pwrite(self._config, command.to_bytes(2, "little"), Offset.COMMAND)

    def _open_bars(self) -> None:
        for bar, resource in self.device.bars().items():
            fd = self._open(self.device.path / f"resource{bar}")
            if resource.io:
                self._ports[bar] = fd
            elif resource.start % mmap.PAGESIZE:
                raise InvalidError(
                    f"{self.device.address}: BAR {bar} at {resource.start:#x} shares a"
                    f" page: boot with pci=resource_alignment=12@{self.device.address}"
                )
            else:
                self._map(bar, fd, resource.size)

    def _map(self, bar: int, fd: int, size: int) -> None:
        self._maps[bar] = mapped = mmap.mmap(fd, size)
        for width, form in _FORMATS.items():
            if size % width == 0:
                self._views[bar, width] = memoryview(mapped).cast(form)

    # Life

    def close(self) -> None:
        """End bus mastering and let go of everything. Idempotent."""
        if not self._fds:
            return
        if self.error is None:
            with suppress(OSError):
                self._put_command(Command.INTX_DISABLE)
        self.lose(NoDeviceError(f"{self.device.address} is closed"))
        self._close_files()

    def _close_files(self) -> None:
        for view in self._views.values():
            view.release()
        for mapped in self._maps.values():
            mapped.close()
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds.clear()

    # PciFunction

    def _config_get(self, offset: int, size: int) -> bytes:
        return self._read(self._config, offset, size)

    def _config_put(self, offset: int, data: bytes) -> None:
        self._write(self._config, offset, data)

    def _bar_get(self, bar: int, offset: int, size: int) -> bytes:
        if bar in self._ports:
            return self._read(self._ports[bar], offset, size)
        view, index = self._view(bar, offset, size)
        return view[index].to_bytes(size, "little")

    def _bar_put(self, bar: int, offset: int, data: bytes) -> None:
        if bar in self._ports:
            self._write(self._ports[bar], offset, data)
        else:
            view, index = self._view(bar, offset, len(data))
            view[index] = int.from_bytes(data, "little")

    def interrupt_vectors(self, kind: Irq) -> int:
        return 1 if kind == Irq.INTX else 0

    async def enable_interrupts(self, kind: Irq, vectors: int) -> Interrupts:
        """Poll in place of the one INTx."""
        if kind != Irq.INTX or vectors != 1:
            raise InvalidError(f"uio has no {vectors} {kind.name} vectors")
        self._interrupts = PolledInterrupts()
        return self._interrupts

    async def reset(self) -> None:
        await self._turn()
        self._check_open()
        try:
            (self.device.path / "reset").write_text("1")
        except OSError as error:
            raise InvalidError(
                f"{self.device.address} cannot be reset: {error.strerror}"
            ) from None

    def _view(self, bar: int, offset: int, size: int) -> tuple[memoryview, int]:
        """Give the view and the index by which one access of this size is made."""
        self._check_open()
        view = self._views.get((bar, size))
        if view is None or offset % size or not 0 <= offset // size < len(view):
            raise InvalidError(f"BAR {bar} has no {size} bytes at {offset:#x}")
        return view, offset // size


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise PermissionDeniedError(
            f"{path} may be opened by root only: run this as root"
        ) from None
    except OSError as error:
        raise NoDeviceError(f"{path}: {error.strerror}") from None


def _uio_file(device: PciDevice) -> Path:
    found = sorted((device.path / "uio").glob("uio*"))
    if not found:
        raise NoDeviceError(f"{device.address} has no uio device")
    return DEV / found[0].name


@asynccontextmanager
async def opened(device: PciDevice, memory_size: int) -> AsyncIterator[UioFunction]:
    """Bind a function and hold it, with `memory_size` bytes of memory, for the body.

    Raises what `PciDevice.bind`, `UioFunction` and `PhysicalMemory` raise.
    """
    with claimed(device):
        device.bind(DRIVER, DRIVER, load_module)
        with (
            closing(UioFunction(device)) as function,
            PhysicalMemory(memory_size) as function.memory,
        ):
            try:
                async with beside(function.run):
                    yield function
            finally:
                function.close()  # before its memory goes
