"""What PCI functions of this machine have in common, by whatever driver they come.

Accesses are system calls (or loads and stores) that block this thread: the virtual
processor stands still while the host works, so nothing else could run here meanwhile.
Waiting in a helper thread would cost more than most accesses take.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from proxy.errors import again
from proxy.linux.devices import PciDevice
from proxy.pci import Abort, Interrupts, PciFunction
from vbus.errors import BusyError, InvalidError, NoDeviceError, VbusError
from vbus.pci.constants import Offset

ALIVE_PERIOD_S = 1.0
_TURN_NS = 50_000


@dataclass(frozen=True)
class AccessStatistics:
    """Accesses, each of which the host answers while we wait."""

    config_reads: int
    config_writes: int
    bar_reads: int
    bar_writes: int


class LocalFunction(PciFunction):
    """A function that is gone once `error` is set. What it opens is its subclass's."""

    def __init__(self, device: PciDevice) -> None:
        self.device = device
        self.error: VbusError | None = None
        self._interrupts: Interrupts | None = None
        self._turn_ends = 0
        self._counts = [0, 0, 0, 0]

    # For subclasses

    def _config_get(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def _config_put(self, offset: int, data: bytes) -> None:
        raise NotImplementedError

    def _bar_get(self, bar: int, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def _bar_put(self, bar: int, offset: int, data: bytes) -> None:
        raise NotImplementedError

    def _read(self, fd: int, offset: int, size: int) -> bytes:
        self._check_open()
        try:
            data = os.pread(fd, size, offset)
        except OSError as error:
            raise self._refused(error) from None
        if len(data) != size:
            raise InvalidError(f"{self.device.address} has no {size} bytes at {offset}")
        return data

    def _write(self, fd: int, offset: int, data: bytes) -> None:
        self._check_open()
        try:
            os.pwrite(fd, data, offset)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> VbusError:
        if error.errno == errno.ENODEV:
            self.lose(NoDeviceError(f"{self.device.address} is gone"))
            return again(self.error or NoDeviceError())
        return InvalidError(f"{self.device.address}: {error.strerror}")

    # Life

    async def run(self) -> None:
        """Look every second whether the function is still there, until it is not."""
        while self.error is None:
            await trio.sleep(ALIVE_PERIOD_S)
            with suppress(VbusError):
                self._check_alive()

    def lose(self, error: VbusError) -> None:
        """The function is gone: every access gets `error`."""
        if self.error is None:
            self.error = error
            if self._interrupts is not None:
                self._interrupts.fail(error)

    def _check_open(self) -> None:
        if self.error is not None:
            raise again(self.error)

    def _check_alive(self) -> None:
        """A function that is gone reads as all ones. Raises NoDeviceError.

        Not its ids: VFIO keeps those (drivers/vfio/pci/vfio_pci_config.c).
        """
        if self._config_get(Offset.REVISION, 4) == b"\xff" * 4:
            self.lose(NoDeviceError(f"{self.device.address} does not answer any more"))
            self._check_open()

    # PciFunction

    async def config_read(self, offset: int, size: int) -> bytes:
        await self._turn()
        self._counts[0] += 1
        return self._config_get(offset, size)

    async def config_write(self, offset: int, data: bytes) -> None:
        await self._turn()
        self._counts[1] += 1
        self._config_put(offset, data)

    async def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        await self._turn()
        self._counts[2] += 1
        data = self._bar_get(bar, offset, size)
        if data == b"\xff" * size:
            self._check_alive()
        return data

    async def bar_write(
        self, bar: int, offset: int, data: bytes, abort: Abort | None = None
    ) -> None:
        await self._turn()
        self.post_write(bar, offset, data)

    def post_write(self, bar: int, offset: int, data: bytes) -> None:
        self._counts[3] += 1
        self._bar_put(bar, offset, data)

    def ring_doorbell(self, bar: int, offset: int, value: int) -> None:
        self.post_write(bar, offset, value.to_bytes(4, "little"))

    def add_doorbell(self, bar: int, offset: int, value: int) -> None:
        """There is no shorter way than the access itself."""

    def remove_doorbell(self, bar: int, offset: int, value: int) -> None:
        """Nothing was kept."""

    def statistics(self) -> AccessStatistics:
        """A snapshot of the counters."""
        return AccessStatistics(*self._counts)

    async def _turn(self) -> None:
        """Let a cancellation in, and other tasks at least every 50 microseconds."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if time.perf_counter_ns() >= self._turn_ends:
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._turn_ends = time.perf_counter_ns() + _TURN_NS


@contextmanager
def claimed(device: PciDevice) -> Iterator[None]:
    """Be the only one of us that uses a function; also while its driver changes.

    Raises BusyError, NoDeviceError.
    """
    try:
        fd = os.open(device.path / "config", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoDeviceError(f"{device.address}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{device.address} is in use by another process") from None
        yield
    finally:
        os.close(fd)
