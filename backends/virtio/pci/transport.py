"""One virtio device behind PCI registers: the state that every layout shows.

`PciTransport` is what a model calls a transport. Register sets are views on it: which
registers there are, where, and how wide, is theirs; what they do is here. Nothing here
waits or does I/O.

    mode    unknown after a reset; the first access by a register set that belongs to
            legacy or modern drivers picks it, and the other kind is ignored until the
            next reset, which works from either side in every mode (R21, R26).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from backends.virtio.constants import Ring, Status
from backends.virtio.device import DeviceQueue, VirtioDevice
from shm import AddressSpace
from vbus.errors import NotFoundError

NO_VECTOR: Final = 0xFFFF
ISR_QUEUE, ISR_CONFIG = 1, 2
_WORD: Final = 0xFFFF_FFFF


class Mode(Enum):
    """By which registers the driver drives the device."""

    UNKNOWN = "unknown"
    LEGACY = "legacy"
    MODERN = "modern"


class Wires(Protocol):
    """What the function gives: the guest's settings, and interrupts."""

    @property
    def bus_master(self) -> bool:
        """May the device touch memory and interrupt?"""
        ...

    @property
    def msix_enabled(self) -> bool:
        """Did the guest choose MSI-X?"""
        ...

    def message(self, vector: int) -> object:
        """Send an MSI-X message."""
        ...

    def line(self) -> object:
        """Assert INTx; it stands while `PciTransport.isr` is not 0."""
        ...


@dataclass(frozen=True)
class PciStatistics:
    """What drivers did: `ignored` accesses hit no register or broke a rule, `mixed`
    were legacy in modern mode or the other way round."""

    mode: str
    kicks: int
    messages: int
    lines: int
    ignored: int
    mixed: int


class PciTransport:
    """A device's registers, whatever their layout (a VirtioTransport)."""

    def __init__(
        self,
        device: VirtioDevice,
        space: AddressSpace,
        wires: Wires,
        *,
        vectors: int,
        features: int = 0,
    ) -> None:
        """`features` are the transport's own; `vectors` of MSI-X, 0 if there is none.

        Raises InvalidError if the device is shown elsewhere.
        """
        self.device = device
        self.space = space
        self.mode = Mode.UNKNOWN
        self.isr = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.kept: dict[str, int] = {}
        """What register sets remember until the next reset."""
        self.ignored = self.mixed = 0
        self._wires = wires
        self._vectors = vectors
        self._kicks = self._messages = self._lines = 0
        device.attach(self, features=features)
        self._forget()

    def close(self) -> None:
        """Take the device off. The last thing that is done here."""
        self.device.detach()
        self.device.spin_us = 0

    # VirtioTransport

    @property
    def records(self) -> None:
        """A function ends with its process."""

    def save(self) -> None:
        """Nobody goes on with it."""

    def queue_interrupt(self, index: int) -> None:
        self._interrupt(self.queue_vectors[index], ISR_QUEUE)

    def config_interrupt(self) -> None:
        self._interrupt(self._config_vector, ISR_CONFIG)

    def _interrupt(self, vector: int, bit: int) -> None:
        """Send a message or assert the line, as the guest has set up (4.1.4.5)."""
        if not self._wires.bus_master:
            return
        if not self._wires.msix_enabled:
            self.isr |= bit
            self._lines += 1
            self._wires.line()
        elif vector != NO_VECTOR:
            self._messages += 1
            self._wires.message(vector)

    # Life

    def reset(self) -> None:
        """Be as after power on. Never waits, never fails."""
        self.device.set_status(0)
        self._forget()

    def _forget(self) -> None:
        self.mode = Mode.UNKNOWN
        self.isr = 0
        self.device_feature_select = self.driver_feature_select = 0
        self.queue_select = 0
        self.kept.clear()
        self._config_vector = NO_VECTOR
        self.queue_vectors = [NO_VECTOR] * len(self.device.queues)

    def enter(self, mode: Mode) -> bool:
        """Is the driver of this kind? The first to ask after a reset is."""
        if self.mode is Mode.UNKNOWN:
            self.mode = mode
            self.device.legacy = mode is Mode.LEGACY
        if self.mode is not mode:
            self.mixed += 1
            return False
        return True

    def bus_master_lost(self) -> None:
        """Leave memory alone until the next reset: a driver did not tell us to stop."""
        if Status.DRIVER_OK in self.device.status:
            self.device.fail("bus mastering was switched off")

    # What registers show

    @property
    def msix_enabled(self) -> bool:
        return self._wires.msix_enabled

    def offered(self, select: int) -> int:
        """Give 32 of the device's features; 0 where there are none."""
        return self.device.offered >> 32 * select & _WORD if select < 2 else 0

    def accepted(self, select: int) -> int:
        """Give 32 of the features the driver accepted."""
        return self.device.accepted >> 32 * select & _WORD if select < 2 else 0

    def accept(self, select: int, word: int) -> None:
        """Take 32 of the driver's features (R27); ignored where there are none."""
        if select < 2:
            others = self.device.accepted & ~(_WORD << 32 * select)
            self.device.set_features(others | word << 32 * select)

    @property
    def status(self) -> int:
        return int(self.device.status)

    @status.setter
    def status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        self.device.set_status(value)
        if not self._wires.bus_master:
            self.bus_master_lost()

    @property
    def config_vector(self) -> int:
        return self._config_vector

    @config_vector.setter
    def config_vector(self, vector: int) -> None:
        self._config_vector = self._checked(vector)

    @property
    def queue_vector(self) -> int:
        """The selected queue's."""
        index = self.queue_select
        known = index < len(self.queue_vectors)
        return self.queue_vectors[index] if known else NO_VECTOR

    @queue_vector.setter
    def queue_vector(self, vector: int) -> None:
        self.queue_vectors[self.selected.index] = self._checked(vector)

    def _checked(self, vector: int) -> int:
        """A vector that there is not reads back as none (4.1.5.1.2.1)."""
        return vector if vector < self._vectors else NO_VECTOR

    @property
    def selected(self) -> DeviceQueue:
        """The selected queue. Raises NotFoundError."""
        return self.device.queue(self.queue_select)

    def of_queue(self, value: Callable[[DeviceQueue], int], default: int = 0) -> int:
        """Ask the selected queue; the default if there is none."""
        try:
            return value(self.selected)
        except NotFoundError:
            return default

    def reset_queue(self) -> None:
        """Reset the selected queue. Raises NotFoundError."""
        index = self.selected.index
        self.device.reset_queue(index)
        self.queue_vectors[index] = NO_VECTOR

    @property
    def packed(self) -> bool:
        """Are rings packed?"""
        return self.device.has(Ring.PACKED)

    def kick(self, index: int) -> None:
        """The driver notified a queue, by register or eventfd."""
        self._kicks += 1
        self.device.kick(index)

    def take_isr(self) -> int:
        """Read the ISR, which clears it and lets the line go."""
        isr, self.isr = self.isr, 0
        return isr

    def statistics(self) -> PciStatistics:
        """A snapshot of the counters."""
        return PciStatistics(
            mode=self.mode.value,
            kicks=self._kicks,
            messages=self._messages,
            lines=self._lines,
            ignored=self.ignored,
            mixed=self.mixed,
        )
