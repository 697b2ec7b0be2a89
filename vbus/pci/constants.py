"""PCI numbers a conventional function needs: offsets, bits, region and IRQ indexes.

Region and IRQ indexes are VFIO's names for the parts of a function. No behaviour.
"""

from enum import IntEnum, IntFlag

CONFIG_SIZE = 256
CAPABILITIES_START = 0x40


class Region(IntEnum):
    """VFIO region index: 0 to 5 are the BARs."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


BAR_COUNT = 6
REGION_COUNT = 9


class Irq(IntEnum):
    """VFIO interrupt index."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


IRQ_COUNT = 5


class Offset(IntEnum):
    """Registers of a type 0 configuration header."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CLASS_CODE = 0x09
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    ROM_BAR = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class Command(IntFlag):
    """Bits of the command register that a guest may set."""

    IO = 1 << 0
    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


class Status(IntFlag):
    """Bits of the status register that we show."""

    CAPABILITIES = 1 << 4


class Capability(IntEnum):
    """Capability ids."""

    MSI = 0x05
    VENDOR = 0x09
    MSIX = 0x11


MSI_ENABLE = 1 << 0
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENTRY_SIZE = 16
MSIX_ENTRY_MASKED = 1 << 0

BAR_IO = 1 << 0
BAR_IO_FLAGS = 0b11
BAR_MEMORY_FLAGS = 0b1111
