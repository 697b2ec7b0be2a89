"""What a PCI function is to the server that shows it to a guest.

`PciFunction` is the whole contract; `ConfiguredFunction` is the base to build on: it
answers the configuration space, checks bounds and chooses the kind of interrupt, so
that a subclass implements its own BARs only. No access awaits or does I/O.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio
from outcome import Outcome

from shm import AddressSpace
from vbus.errors import InvalidError
from vbus.pci.config_space import ConfigSpace
from vbus.pci.constants import Irq, Region
from vbus.pci.msix import MsixTable
from vbus.saved import Held, Kept, SavedBridge


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One region; size 0 means that the function has no such region.

    `io` says that it is a range of ports. A region with `fd` can be mapped by the
    client, only in the `mappable` parts (offset, size) where there are any, as a whole
    otherwise. The function keeps the descriptor.
    """

    size: int = 0
    io: bool = False
    readable: bool = True
    writable: bool = True
    fd: int | None = None
    mappable: tuple[tuple[int, int], ...] = ()


NO_REGION = RegionInfo()


@dataclass(frozen=True, slots=True)
class IoEventFd:
    """A write of `size` bytes at `offset` may be done by adding 1 to eventfd `fd`.

    With `datamatch` only a write of that value counts. The function keeps the
    descriptor; whoever hands it on passes a duplicate.
    """

    offset: int
    size: int
    fd: int
    datamatch: int | None = None


class InterruptSink(Protocol):
    """The attached client, as far as a function raises interrupts towards it."""

    def trigger(self, index: int, vector: int) -> bool:
        """Raise `vector` of the IRQ kind `index`; False: the client set no eventfd."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """An access that cannot be answered yet.

    The server awaits `work()` in a task of its own for at most `timeout_s`, while it
    goes on answering other accesses, and then calls `complete` with what came of it:
    a Value, or an Error that holds the exception (CallTimeoutError after the
    deadline). What `complete` returns answers the access: the data of a read, None
    for a write. Neither is called any more once the client has gone.
    """

    work: Callable[[], Awaitable[object]]
    complete: Callable[[Outcome[object]], bytes | None]
    timeout_s: float


class PciFunction(ABC):
    """A function a client can attach to, one client at a time.

    All methods are called from one thread and must not block. A VbusError they raise
    answers the request with its errno.
    """

    memory: AddressSpace
    """The guest's memory as this function sees it; the server maps and unmaps it."""

    @abstractmethod
    def region(self, index: int) -> RegionInfo:
        """Describe region `index` (0 to 8); NO_REGION if there is none."""

    @abstractmethod
    def irq_count(self, index: int) -> int:
        """Give the number of vectors of the IRQ kind `index`, 0 if it has none."""

    @abstractmethod
    def read(self, region: int, offset: int, size: int) -> bytes | Pending:
        """Read `size` bytes. Raises InvalidError outside of the region."""

    @abstractmethod
    def write(self, region: int, offset: int, data: bytes) -> Pending | None:
        """Write `data`. Raises InvalidError outside of the region."""

    def io_eventfds(self, region: int, limit: int) -> list[IoEventFd]:
        """Give at most `limit` shortcuts for writes to `region`, newest first."""
        return []

    def fence(self) -> Callable[[], Awaitable[object]] | None:
        """Give what must be awaited before the client gets one more answer.

        Another process may still use memory of which the answer would tell the guest
        that nobody does. None: nothing. It ends by itself within a deadline.
        """
        return None

    def statistics(self) -> object:
        """Give a frozen dataclass of counters, or a dict."""
        return {}

    def line_asserted(self) -> bool:
        """Does INTx stand? Then it is raised anew when the client unmasks it."""
        return False

    async def run(self) -> None:
        """Do what the function does by itself, until cancelled; it is being served."""
        await trio.sleep_forever()

    def close(self) -> None:  # noqa: B027
        """Let go of everything: the function is not shown any more."""

    @abstractmethod
    def attach(self, interrupts: InterruptSink) -> None:
        """Take a client: `interrupts` is valid until `detach`."""

    @abstractmethod
    def detach(self) -> None:
        """Forget the client and all that is the guest's. `memory` is cleared next."""

    @property
    def busy(self) -> bool:
        """Is something under way that `save` must not cut?"""
        return False

    def save(self, kept: Kept) -> SavedBridge:
        """Give all that is the client's but its memory and interrupts.

        Raises InvalidError: this function cannot be handed to another process.
        """
        raise InvalidError(f"{type(self).__name__} cannot be saved")

    def resume(self, saved: SavedBridge, held: Held) -> None:  # noqa: B027
        """Go on where another one was; it is attached, and has its memory."""

    @abstractmethod
    def reset(self) -> None:
        """Go back to the state after power on; the client and its memory stay."""


class ConfiguredFunction(PciFunction):
    """A function with a configuration space; subclasses implement the BARs."""

    def __init__(self, config: ConfigSpace, memory: AddressSpace) -> None:
        self.config = config
        self.memory = memory
        self.msix = MsixTable(config.msix) if config.msix is not None else None
        self._interrupts: InterruptSink | None = None

    # What a subclass adds

    def bar_read(self, bar: int, offset: int, size: int) -> bytes | Pending:
        """Read within a BAR; never called for the BAR of the MSI-X table."""
        return bytes(size)

    def bar_write(self, bar: int, offset: int, data: bytes) -> Pending | None:
        """Write within a BAR; never called for the BAR of the MSI-X table."""
        return None

    def bus_master_changed(self, enabled: bool) -> None:
        """Learn that the guest switched bus mastering: without it, hands off."""

    # The contract

    @property
    def bus_master(self) -> bool:
        """May this function touch guest memory and raise interrupts?"""
        return self.config.bus_master

    @property
    def attached(self) -> bool:
        return self._interrupts is not None

    def region(self, index: int) -> RegionInfo:
        if index == Region.CONFIG:
            return RegionInfo(self.config.size)
        bar = self.config.bars.get(index)
        return NO_REGION if bar is None else RegionInfo(bar.size, io=bar.io)

    def irq_count(self, index: int) -> int:
        if index == Irq.INTX:
            return 1 if self.config.interrupt_pin else 0
        if index == Irq.MSI:
            return 1 if self.config.msi is not None else 0
        if index == Irq.MSIX:
            return self.config.msix.vectors if self.config.msix is not None else 0
        return 0

    def read(self, region: int, offset: int, size: int) -> bytes | Pending:
        self._check(region, offset, size)
        if region == Region.CONFIG:
            return self.config.read(offset, size)
        if self.msix is not None and region == self.msix.bar:
            return self.msix.read(offset, size)
        return self.bar_read(region, offset, size)

    def write(self, region: int, offset: int, data: bytes) -> Pending | None:
        self._check(region, offset, len(data))
        if region == Region.CONFIG:
            self._config_write(offset, data)
            return None
        if self.msix is not None and region == self.msix.bar:
            self.msix.write(offset, data)
            return None
        return self.bar_write(region, offset, data)

    def attach(self, interrupts: InterruptSink) -> None:
        self._interrupts = interrupts

    def detach(self) -> None:
        """Forget the client; the next one finds the function as after power on."""
        self._interrupts = None
        self.reset()

    def reset(self) -> None:
        was_master = self.config.bus_master
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        if was_master:
            self.bus_master_changed(False)

    def interrupt(self, vector: int = 0) -> bool:
        """Raise an interrupt the way the guest has set up now; False: it cannot.

        MSI-X if the client listens on that vector, else the one MSI, else INTx unless
        it is disabled. The choice is made anew each time, as guests change their minds
        (ABI 12.1). Nothing is raised while bus mastering is off (ABI 12.2).
        """
        sink = self._interrupts
        if sink is None or not self.config.bus_master:
            return False
        return (
            sink.trigger(Irq.MSIX, vector)
            or sink.trigger(Irq.MSI, 0)
            or (not self.config.intx_disabled and sink.trigger(Irq.INTX, 0))
        )

    def _config_write(self, offset: int, data: bytes) -> None:
        was_master = self.config.bus_master
        self.config.write(offset, data)
        if self.config.bus_master != was_master:
            self.bus_master_changed(not was_master)

    def _check(self, region: int, offset: int, size: int) -> None:
        if region == Region.CONFIG:
            limit = self.config.size
        else:
            bar = self.config.bars.get(region)
            limit = 0 if bar is None else bar.size
        if offset < 0 or size <= 0 or offset + size > limit:
            raise InvalidError(
                f"access of {size} bytes at {offset:#x} is outside of region {region}"
                f" of {limit} bytes"
            )
