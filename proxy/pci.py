"""What a PCI function is to the driver that drives it, wherever that runs.

`PciFunction` is the whole contract between the bridge driver and the platform: a
vfio-user client makes one out of a socket, VFIO makes one inside of a virtual machine.
"""

import select
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import trio

from proxy.errors import again
from proxy.memory import DmaMemory
from shm import Doorbell
from vbus.errors import NoDeviceError, ProtocolError, VbusError
from vbus.pci.constants import CONFIG_SIZE, Command, Irq, Offset, Status

_CAPABILITY_LIMIT = CONFIG_SIZE // 4


@dataclass(frozen=True)
class InterruptStatistics:
    """Interrupts taken, by vector; what came together while we slept counts as one."""

    by_vector: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.by_vector)


class Interrupts:
    """The vectors of a function, each an eventfd, awaited together."""

    def __init__(self, count: int) -> None:
        self.doorbells = tuple(Doorbell() for _ in range(count))
        self._counts = [0] * count
        self._vectors = {bell.fileno(): n for n, bell in enumerate(self.doorbells)}
        self._epoll = select.epoll()
        for fd in self._vectors:
            self._epoll.register(fd, select.EPOLLIN)
        self._error: VbusError | None = None

    async def wait(self) -> list[int]:
        """Wait until some vectors fire and give their numbers. A checkpoint.

        Raises the error of `fail`; cancelled, it has taken nothing.
        """
        while True:
            if self._error is not None:
                raise again(self._error)
            try:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            except trio.ClosedResourceError:
                continue  # closed by `fail`
            if fired := self.take():
                return fired

    def watch(self, look: Callable[[], bool]) -> None:
        """Where there is no interrupt but polling, `look` tells whether to wake."""

    def take(self) -> list[int]:
        """Give the vectors that fired since the last time, without waiting."""
        if self._epoll.closed:
            return []
        fired = []
        for fd, _ in self._epoll.poll(0):
            vector = self._vectors[fd]
            if self.doorbells[vector].drain():
                self._counts[vector] += 1
                fired.append(vector)
        return fired

    def fail(self, error: VbusError) -> None:
        """The function is gone: whoever waits gets `error`."""
        self._error = self._error or error
        self._close()

    def close(self) -> None:
        """Close all eventfds. Idempotent."""
        self.fail(NoDeviceError("the interrupts are disabled"))

    def _close(self) -> None:
        if not self._epoll.closed:
            trio.lowlevel.notify_closing(self._epoll.fileno())
            self._epoll.close()
        for doorbell in self.doorbells:
            doorbell.close()

    def statistics(self) -> InterruptStatistics:
        """A snapshot of the counters."""
        return InterruptStatistics(tuple(self._counts))


class AbortedError(VbusError):
    """An access was not waited for to its end; `reason` says why."""

    def __init__(self, reason: VbusError) -> None:
        super().__init__(reason)
        self.reason = again(reason)


class Abort:
    """Ends the wait for an access from elsewhere, where the platform waits at all.

    Cheaper than a cancel scope for each access. `hook` is set by who waits.
    """

    __slots__ = ("hook",)

    def __init__(self) -> None:
        self.hook: Callable[[VbusError], object] | None = None

    def __call__(self, reason: VbusError) -> None:
        """Have the access raise AbortedError."""
        if self.hook is not None:
            self.hook(AbortedError(reason))


class PciFunction(ABC):
    """One function. Every access raises NoDeviceError once the function is gone."""

    memory: DmaMemory
    """Memory that the function can reach."""

    @abstractmethod
    async def config_read(self, offset: int, size: int) -> bytes:
        """Read configuration space."""

    @abstractmethod
    async def config_write(self, offset: int, data: bytes) -> None:
        """Write configuration space; done when this returns."""

    @abstractmethod
    async def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        """Read from a BAR, after all writes before it."""

    @abstractmethod
    async def bar_write(
        self, bar: int, offset: int, data: bytes, abort: Abort | None = None
    ) -> None:
        """Write to a BAR; the function has done what it causes when this returns.

        Cancelled or aborted, it may not have yet.
        """

    @abstractmethod
    def post_write(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR without waiting, in order with all other accesses."""

    @abstractmethod
    def ring_doorbell(self, bar: int, offset: int, value: int) -> None:
        """Write 32 bits without waiting, in no order with anything, by the shortest
        way there is."""

    @abstractmethod
    def add_doorbell(self, bar: int, offset: int, value: int) -> None:
        """Find a short way for a doorbell that will be rung, in the background."""

    @abstractmethod
    def remove_doorbell(self, bar: int, offset: int, value: int) -> None:
        """Forget a doorbell which will not be rung any more."""

    @abstractmethod
    def interrupt_vectors(self, kind: Irq) -> int:
        """Give the number of vectors of one kind of interrupt, 0 if it has none."""

    @abstractmethod
    async def enable_interrupts(self, kind: Irq, vectors: int) -> Interrupts:
        """Have MSI or MSI-X delivered to eventfds, which the function closes with
        itself."""

    @abstractmethod
    async def reset(self) -> None:
        """Put the function into the state after power on."""

    @abstractmethod
    def statistics(self) -> object:
        """Give a frozen dataclass of what the platform counts."""

    # What every platform shares

    async def config_read_u16(self, offset: int) -> int:
        return int.from_bytes(await self.config_read(offset, 2), "little")

    async def find_capability(self, wanted: int) -> int:
        """Give the offset of a capability, 0 if there is none. Raises ProtocolError."""
        if not await self.config_read_u16(Offset.STATUS) & Status.CAPABILITIES:
            return 0
        at = (await self.config_read(Offset.CAPABILITIES, 1))[0] & ~3
        for _ in range(_CAPABILITY_LIMIT):
            if not at:
                return 0
            ident, following = await self.config_read(at, 2)
            if ident == wanted:
                return at
            at = following & ~3
        raise ProtocolError("the capabilities of the function do not end")

    async def set_command(self, bits: Command, *, on: bool) -> None:
        """Set or clear bits of the command register."""
        command = await self.config_read_u16(Offset.COMMAND)
        command = command | bits if on else command & ~bits
        await self.config_write(Offset.COMMAND, command.to_bytes(2, "little"))
