"""Registers as tables, and what else can be seen through a BAR.

A layout's registers are a tuple of `Register`, in order and without gaps; each names
an attribute of its set. Only an access of exactly one register counts (virtio 1.2,
4.1.3.1): every other one reads zeros or changes nothing, and is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from backends.virtio.pci.transport import Mode, PciTransport
from vbus.errors import VbusError


class Window(Protocol):
    """A part of a BAR; offsets are its own."""

    def read(self, offset: int, size: int) -> bytes:
        """Read; never fails."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write; never fails."""
        ...


@dataclass(frozen=True, slots=True)
class Register:
    """`size` bytes of the attribute `name`; `access` is "r", "w", "rw" or "" (pad).

    A `shared` one serves drivers of either mode and picks none.
    """

    name: str
    size: int
    access: str = "rw"
    shared: bool = False


def halves(name: str, access: str = "rw") -> tuple[Register, Register]:
    """Give the two registers of a 64-bit field, `name`_lo and `name`_hi."""
    return Register(f"{name}_lo", 4, access), Register(f"{name}_hi", 4, access)


def places(table: tuple[Register, ...]) -> Iterator[tuple[int, Register]]:
    """Iterate over a table with each register's offset."""
    at = 0
    for register in table:
        yield at, register
        at += register.size


class RegisterSet:
    """One table of registers on a device; subclasses add the attributes it names."""

    TABLE: ClassVar[tuple[Register, ...]] = ()
    mode: ClassVar[Mode | None] = None
    """Whose registers these are; None: they pick no mode."""
    length: ClassVar[int] = 0
    _places: ClassVar[dict[tuple[int, int], Register]] = {}

    def __init_subclass__(cls) -> None:
        cls.length = sum(register.size for register in cls.TABLE)
        cls._places = {(at, each.size): each for at, each in places(cls.TABLE)}

    def __init__(self, device: PciTransport) -> None:
        self.device = device

    def read(self, offset: int, size: int) -> bytes:
        register = self._places.get((offset, size))
        if register is None or "r" not in register.access:
            self.device.ignored += 1
            return bytes(size)
        if not self._enter(register):
            return bytes(size)
        value: int = getattr(self, register.name)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        register = self._places.get((offset, len(data)))
        if register is None or "w" not in register.access:
            self.device.ignored += 1
            return
        value = int.from_bytes(data, "little")
        if register.name == "status" and value == 0:
            self.device.reset()  # in every mode, whoever asks (R26)
        elif self._enter(register):
            try:
                setattr(self, register.name, value)
            except VbusError:
                self.device.ignored += 1

    def _enter(self, register: Register) -> bool:
        return self.mode is None or register.shared or self.device.enter(self.mode)

    # What most tables have

    @property
    def status(self) -> int:
        return self.device.status

    @status.setter
    def status(self, value: int) -> None:
        self.device.status = value

    @property
    def config_vector(self) -> int:
        return self.device.config_vector

    @config_vector.setter
    def config_vector(self, vector: int) -> None:
        self.device.config_vector = vector

    @property
    def queue_vector(self) -> int:
        return self.device.queue_vector

    @queue_vector.setter
    def queue_vector(self, vector: int) -> None:
        self.device.queue_vector = vector

    @property
    def queue_select(self) -> int:
        return self.device.queue_select

    @queue_select.setter
    def queue_select(self, index: int) -> None:
        self.device.queue_select = index

    @property
    def isr(self) -> int:
        return self.device.take_isr()

    def _set_notify(self, index: int) -> None:
        self.device.kick(index)

    queue_notify = property(None, _set_notify)


class SelectedFeatures(RegisterSet):
    """Features in words of 32 bits behind selectors (R27)."""

    @property
    def device_feature_select(self) -> int:
        return self.device.device_feature_select

    @device_feature_select.setter
    def device_feature_select(self, value: int) -> None:
        self.device.device_feature_select = value

    @property
    def device_feature(self) -> int:
        return self.device.offered(self.device.device_feature_select)

    @property
    def driver_feature_select(self) -> int:
        return self.device.driver_feature_select

    @driver_feature_select.setter
    def driver_feature_select(self, value: int) -> None:
        self.device.driver_feature_select = value

    @property
    def driver_feature(self) -> int:
        return self.device.accepted(self.device.driver_feature_select)

    @driver_feature.setter
    def driver_feature(self, word: int) -> None:
        self.device.accept(self.device.driver_feature_select, word)


class DeviceConfig:
    """The device's configuration, little-endian, in accesses of any width."""

    def __init__(self, device: PciTransport, mode: Mode | None = None) -> None:
        self._device = device
        self._mode = mode

    def read(self, offset: int, size: int) -> bytes:
        if self._mode is not None and not self._device.enter(self._mode):
            return bytes(size)
        return self._device.device.read_config(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        if self._mode is None or self._device.enter(self._mode):
            self._device.device.write_config(offset, data)


class IsrWindow(RegisterSet):
    """The interrupt status alone: one byte, cleared by reading (4.1.4.5)."""

    TABLE = (Register("isr", 1, "r"),)


class NotifyWindow:
    """One slot for each queue; what is written is the queue's number (4.1.5.2).

    The slot says which queue, not the value.
    """

    MULTIPLIER: Final = 4

    def __init__(self, device: PciTransport) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        index, within = divmod(offset, self.MULTIPLIER)
        if within or len(data) not in (2, 4):
            self._device.ignored += 1
        else:
            self._device.kick(index)


class FixedWindow:
    """Bytes that only read, such as a table of offsets."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Change nothing."""
