"""Numbers of the vfio-user protocol, version 0.1, as QEMU 11 speaks it.

Names follow the protocol without its VFIO_USER_ prefix. No behaviour.
"""

from enum import IntEnum, IntFlag

VERSION_MAJOR = 0
VERSION_MINOR = 1

HEADER_SIZE = 16
MAX_DATA_XFER_SIZE = 1 << 20
MAX_MESSAGE_SIZE = HEADER_SIZE + 16 + MAX_DATA_XFER_SIZE
MAX_MSG_FDS = 16
"""What a server announces; QEMU refuses one that announces more."""
SCM_MAX_FD = 253
"""Linux passes no more descriptors than this in one message."""
MAX_DMA_MAPS = 65535
PAGE_SIZES = 4096
WRITE_MULTI_MAX = 200


class Command(IntEnum):
    """Message commands; DMA_READ and DMA_WRITE are sent by the server."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15


class Flag(IntFlag):
    """Header flags; the low four bits are the message's type."""

    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20


TYPE_MASK = 0xF


class DmaFlag(IntFlag):
    """DMA_MAP: what the device may do with the range."""

    READ = 1
    WRITE = 2


class UnmapFlag(IntFlag):
    """DMA_UNMAP."""

    GET_DIRTY_BITMAP = 1
    ALL = 2


class DeviceFlag(IntFlag):
    """DEVICE_GET_INFO."""

    RESET = 1
    PCI = 2


class RegionFlag(IntFlag):
    """DEVICE_GET_REGION_INFO."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


REGION_CAP_SPARSE_MMAP = 1


class IoFdType(IntEnum):
    """DEVICE_GET_REGION_IO_FDS: how a sub-region's descriptor is used."""

    IOEVENTFD = 0
    IOREGIONFD = 1


class IoEventFdFlag(IntFlag):
    """The flags of KVM's ioeventfd."""

    DATAMATCH = 1
    PIO = 2


class IrqInfoFlag(IntFlag):
    """DEVICE_GET_IRQ_INFO."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSetFlag(IntFlag):
    """DEVICE_SET_IRQS: one of the three kinds of data and one of the three actions."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32


IRQ_SET_DATA = IrqSetFlag.DATA_NONE | IrqSetFlag.DATA_BOOL | IrqSetFlag.DATA_EVENTFD
IRQ_SET_ACTIONS = (
    IrqSetFlag.ACTION_MASK | IrqSetFlag.ACTION_UNMASK | IrqSetFlag.ACTION_TRIGGER
)
