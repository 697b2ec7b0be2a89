"""Configuration space of a conventional PCI function: 256 bytes behind write masks.

A guest's write changes only the bits that the standard makes writable; ids, sizes,
capability offsets and everything unused never move (R53). No function of its own:
who decodes BARs or delivers interrupts is elsewhere.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vbus.errors import InvalidError
from vbus.pci.constants import (
    BAR_COUNT,
    BAR_IO,
    BAR_IO_FLAGS,
    BAR_MEMORY_FLAGS,
    CAPABILITIES_START,
    CONFIG_SIZE,
    MSI_ENABLE,
    MSIX_ENABLE,
    MSIX_ENTRY_SIZE,
    MSIX_FUNCTION_MASK,
    Capability,
    Command,
    Offset,
    Status,
)

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_CAPABILITY_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: 32-bit memory, or ports when `io`."""

    size: int
    io: bool = False

    def __post_init__(self) -> None:
        least = 4 if self.io else 16
        if self.size < least or self.size & (self.size - 1) or self.size > 1 << 31:
            raise InvalidError(
                f"BAR size {self.size:#x} is not a power of two from {least}"
            )

    @property
    def value(self) -> int:
        """The read-only low bits."""
        return BAR_IO if self.io else 0

    @property
    def mask(self) -> int:
        """The address bits a guest can set; it finds the size by them."""
        flags = BAR_IO_FLAGS if self.io else BAR_MEMORY_FLAGS
        return ~(self.size - 1) & ~flags & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Msi:
    """MSI with one vector, a 32-bit address and no mask bits (ABI section 1)."""

    def body(self) -> tuple[bytes, bytes]:
        """Give what follows the two header bytes, and its write mask."""
        return bytes(8), struct.pack("<HIH", MSI_ENABLE, 0xFFFFFFFC, 0xFFFF)

    @property
    def id(self) -> int:
        return Capability.MSI


@dataclass(frozen=True, slots=True)
class Msix:
    """MSI-X with its table at offset 0 of `bar` and the pending bits at `pba`."""

    vectors: int
    bar: int
    pba: int

    def __post_init__(self) -> None:
        table = self.vectors * MSIX_ENTRY_SIZE
        if not 1 <= self.vectors <= 2048 or self.pba < table or self.pba % 8:
            raise InvalidError(
                f"MSI-X of {self.vectors} vectors with its pending bits at"
                f" {self.pba:#x}"
            )

    def body(self) -> tuple[bytes, bytes]:
        """Give what follows the two header bytes, and its write mask."""
        values = struct.pack("<HII", self.vectors - 1, self.bar, self.pba | self.bar)
        return values, struct.pack("<HII", MSIX_ENABLE | MSIX_FUNCTION_MASK, 0, 0)

    @property
    def id(self) -> int:
        return Capability.MSIX


@dataclass(frozen=True, slots=True)
class Vendor:
    """A vendor-specific capability: bytes after its length byte.

    `writable` has the bits that a guest may change; what it lacks is read-only.
    """

    data: bytes
    writable: bytes = b""

    def body(self) -> tuple[bytes, bytes]:
        """Give what follows the two header bytes, and its write mask."""
        length = _U8.pack(3 + len(self.data))
        return length + self.data, b"\0" + self.writable.ljust(len(self.data), b"\0")

    @property
    def id(self) -> int:
        return Capability.VENDOR


@dataclass(frozen=True, slots=True)
class Identity:
    """The read-only head: ids, class code (24 bits) and revision."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class ConfigSpace:
    """The 256 bytes of one function.

    Capabilities are chained in the given order from 0x40 on, each at a multiple of
    16, so that MSI followed by MSI-X stand at 0x40 and 0x50.
    """

    size = CONFIG_SIZE

    def __init__(
        self,
        identity: Identity,
        bars: Mapping[int, Bar],
        capabilities: Sequence[Msi | Msix | Vendor] = (),
        *,
        interrupt_pin: int = 0,
    ) -> None:
        self.bars: Mapping[int, Bar] = dict(bars)
        self.interrupt_pin = interrupt_pin
        self.msi: Msi | None = None
        self.msix: Msix | None = None
        self._offsets: list[tuple[Msi | Msix | Vendor, int]] = []
        self._initial = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._build_head(identity)
        self._build_bars()
        self._build_capabilities(capabilities)
        self.reset()

    def reset(self) -> None:
        """Go back to the state after power on."""
        self._bytes = bytearray(self._initial)
        self._bus_master = False

    def save(self) -> bytes:
        """Give all bytes as they are now, for `resume`."""
        return bytes(self._bytes)

    def resume(self, saved: bytes) -> None:
        """Be as another one was of the same layout. Raises InvalidError."""
        if len(saved) != CONFIG_SIZE:
            raise InvalidError(f"{len(saved)} bytes are no configuration space")
        self.reset()
        self.write(0, saved)

    @property
    def bus_master(self) -> bool:
        """The bus master bit of the command register."""
        return self._bus_master

    @property
    def intx_disabled(self) -> bool:
        """The interrupt disable bit of the command register."""
        return bool(self._read_u16(Offset.COMMAND) & Command.INTX_DISABLE)

    @property
    def command(self) -> Command:
        """The command register."""
        return Command(self._read_u16(Offset.COMMAND))

    @property
    def msix_enabled(self) -> bool:
        """The enable bit of MSI-X; False without such a capability."""
        if self.msix is None:
            return False
        return bool(self._read_u16(self.offset_of(self.msix) + 2) & MSIX_ENABLE)

    def offset_of(self, capability: Msi | Msix | Vendor) -> int:
        """Give where a capability is. Raises InvalidError."""
        for known, at in self._offsets:
            if known is capability:
                return at
        raise InvalidError(f"{capability} is not in this configuration space")

    def bar_address(self, bar: int) -> int:
        """Give the address the guest has put into a BAR."""
        at = Offset.BAR0 + 4 * bar
        value: int = _U32.unpack_from(self._bytes, at)[0]
        return value & self.bars[bar].mask

    def read(self, offset: int, size: int) -> bytes:
        """Read any number of bytes. Raises InvalidError beyond the 256."""
        self._check(offset, size)
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Change the writable bits only. Raises InvalidError beyond the 256."""
        self._check(offset, len(data))
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = (self._bytes[at] & ~mask) | (value & mask)
        self._bus_master = bool(self._bytes[Offset.COMMAND] & Command.BUS_MASTER)

    def _build_head(self, identity: Identity) -> None:
        self._put(_U16, Offset.VENDOR_ID, identity.vendor)
        self._put(_U16, Offset.DEVICE_ID, identity.device)
        self._put(_U8, Offset.REVISION, identity.revision)
        self._put(_U8, Offset.CLASS_CODE, identity.class_code & 0xFF)
        self._put(_U16, Offset.CLASS_CODE + 1, identity.class_code >> 8)
        self._put(_U16, Offset.SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor)
        self._put(_U16, Offset.SUBSYSTEM_ID, identity.subsystem)
        self._put(_U16, Offset.COMMAND, 0, sum(Command))
        self._put(_U8, Offset.CACHE_LINE_SIZE, 0, 0xFF)
        self._put(_U8, Offset.LATENCY_TIMER, 0, 0xFF)
        self._put(_U8, Offset.INTERRUPT_LINE, 0, 0xFF)
        self._put(_U8, Offset.INTERRUPT_PIN, self.interrupt_pin)

    def _build_bars(self) -> None:
        for index, bar in self.bars.items():
            if not 0 <= index < BAR_COUNT:
                raise InvalidError(f"there is no BAR {index}")
            self._put(_U32, Offset.BAR0 + 4 * index, bar.value, bar.mask)

    def _build_capabilities(self, capabilities: Sequence[Msi | Msix | Vendor]) -> None:
        pointer: int = Offset.CAPABILITIES
        at = CAPABILITIES_START
        for capability in capabilities:
            body, mask = capability.body()
            end = at + 2 + len(body)
            if end > CONFIG_SIZE:
                raise InvalidError("the capabilities do not fit into 256 bytes")
            self._register(capability)
            self._offsets.append((capability, at))
            self._put(_U8, pointer, at)
            self._put(_U8, at, capability.id)
            self._initial[at + 2 : end] = body
            self._writable[at + 2 : end] = mask
            pointer = at + 1
            at = -(-end // _CAPABILITY_ALIGNMENT) * _CAPABILITY_ALIGNMENT
        if capabilities:
            self._put(_U16, Offset.STATUS, Status.CAPABILITIES)

    def _register(self, capability: Msi | Msix | Vendor) -> None:
        if isinstance(capability, Msi):
            self.msi = capability
        elif isinstance(capability, Msix):
            bar = self.bars.get(capability.bar)
            pending = -(-capability.vectors // 64) * 8
            if bar is None or bar.io or capability.pba + pending > bar.size:
                raise InvalidError(f"MSI-X does not fit into BAR {capability.bar}")
            self.msix = capability

    def _put(self, form: struct.Struct, offset: int, value: int, mask: int = 0) -> None:
        form.pack_into(self._initial, offset, value)
        form.pack_into(self._writable, offset, mask)

    def _read_u16(self, offset: int) -> int:
        value: int = _U16.unpack_from(self._bytes, offset)[0]
        return value

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > CONFIG_SIZE:
            raise InvalidError(
                f"{size} bytes at {offset:#x} are outside of configuration space"
            )
