"""The guest ABI of the bridge: numbers and struct layouts, nothing else.

Little-endian, x86-64 C alignment, as docs/abi.md writes it down. Both ends use it: the
bridge here and the bridge driver of a guest. Extensions of ours are marked so; a guest
reaches them only by the capability bits it offers in NEGOTIATE.
"""

import struct
from enum import IntEnum
from typing import Any, Generic, NamedTuple, TypeVar

# The PCI function
VENDOR_ID = 0x11DA
DEVICE_ID = 0x2000
REVISION = 2
CLASS_CODE = 0x068000
SUBSYSTEM_VENDOR_ID = 0x1AF4
SUBSYSTEM_ID = 0x1100
INTERRUPT_PIN = 1
BAR_CALLS = 0
BAR_SIGNALS = 1
BAR_MSIX = 2  # extension
BAR_CALLS_SIZE = 64
BAR_SIGNALS_SIZE = 32
BAR_MSIX_SIZE = 4096
MSIX_PBA_OFFSET = 0x800

# BAR1: the signal window
SIGNAL_EVENTQ = 0
SIGNAL_FASTCALL = 4
SIGNAL_SHM = 8

# NEGOTIATE
NEGOTIATE_MAGIC = 0xBF53EEF5
HYPERCALL_VERSION = 1
CAP_MULTIQUEUE = 1 << 0  # extension
CAP_NAMES = 1 << 1  # extension
CAPABILITIES = CAP_MULTIQUEUE | CAP_NAMES

# Event queues
QUEUE_LIMIT = 8
RING_LIMIT = 2048
PRIORITY_HIGHEST = 7
NO_SIGNAL = 0xFFFFFFFF
TYPE_LIMIT = 127
NAME_LIMIT = 63


class BridgeCall(IntEnum):
    """Call numbers in BAR0."""

    NEGOTIATE = 0
    QREG = 1
    SLOWCALL = 2
    FASTCALL_ADD = 3
    FASTCALL_DROP = 4


class Hypercall(IntEnum):
    """Call numbers inside a SLOWCALL or a fast call."""

    DEVOPEN = 0
    DEVCLOSE = 1
    DEVCALL = 2
    DEVSHM = 3
    DEVOPEN_NAME = 4  # extension, CAP_NAMES


class EventId(IntEnum):
    """What an event says."""

    DEVADD = 0
    DEVDROP = 1
    SHMSIGNAL = 2
    SHMCLOSE = 3
    DEVNAME = 4  # extension, CAP_NAMES: comes just before that device's DEVADD


Record = TypeVar("Record", bound=tuple[Any, ...])


class Layout(Generic[Record]):
    """How one record lies in guest memory."""

    __slots__ = ("_pack", "_record", "_unpack", "size")

    def __init__(self, form: str, record: type[Record]) -> None:
        layout = struct.Struct(form)
        self.size = layout.size
        self._pack = layout.pack
        self._unpack = layout.unpack
        self._record = record

    def pack(self, record: Record) -> bytes:
        """Give the bytes of `record`; padding is zero."""
        return self._pack(*record)

    def unpack(self, data: bytes | bytearray | memoryview) -> Record:
        """Read a record from exactly `size` bytes; padding is not looked at."""
        return self._record(*self._unpack(data))


class CallDescriptor(NamedTuple):
    """`vbus_pci_call_desc`: a call number and where its argument lies."""

    vector: int
    len: int
    datap: int


class FastCall(NamedTuple):
    """`vbus_pci_fastcall_desc`: a call descriptor and the place of its result."""

    vector: int
    len: int
    datap: int
    result: int


class Negotiate(NamedTuple):
    """Argument of NEGOTIATE; `capabilities` goes both ways."""

    magic: int
    version: int
    capabilities: int


class QueueEntry(NamedTuple):
    """One event queue of QREG: descriptors, GPA of the ring, GPA of the buffers."""

    descriptors: int
    ring: int
    data: int


class DeviceOpen(NamedTuple):
    """Argument of DEVOPEN; the host fills in `handle`."""

    devid: int
    version: int
    handle: int


class DeviceOpenName(NamedTuple):
    """Argument of DEVOPEN_NAME (extension); the host fills in `devid` and `handle`."""

    version: int
    name: bytes
    devid: int
    handle: int


class DeviceClose(NamedTuple):
    """Argument of DEVCLOSE."""

    handle: int


class DeviceCall(NamedTuple):
    """Argument of DEVCALL; the data at `datap` goes both ways."""

    handle: int
    func: int
    len: int
    flags: int
    datap: int


class DeviceShm(NamedTuple):
    """Argument of DEVSHM; with NO_SIGNAL as offset prio and cookie are undefined."""

    handle: int
    id: int
    len: int
    flags: int
    signal_offset: int
    prio: int
    cookie: int
    datap: int


class Event(NamedTuple):
    """An event record; `handle` is a device id or a cookie, `text` a type or a name."""

    eventid: int
    handle: int
    text: bytes = b""


CALL = Layout("<IIQ", CallDescriptor)
FASTCALL = Layout("<IIQi4x", FastCall)
NEGOTIATE = Layout("<IIQ", Negotiate)
QUEUE_ENTRY = Layout("<I4xQQ", QueueEntry)
DEVOPEN = Layout("<IIQ", DeviceOpen)
DEVOPEN_NAME = Layout("<I4x64sQQ", DeviceOpenName)
DEVCLOSE = Layout("<Q", DeviceClose)
DEVCALL = Layout("<QIII4xQ", DeviceCall)
DEVSHM = Layout("<QIII4xIIQQ", DeviceShm)
EVENT = Layout("<I4xQ128s", Event)

EVENT_SIZE = EVENT.size
QREG_HEAD = struct.Struct("<I4x")
RESULT = struct.Struct("<i")
RESULT_OFFSET = CALL.size


def pack_qreg(queues: list[QueueEntry]) -> bytes:
    """Build the argument of QREG."""
    return QREG_HEAD.pack(len(queues)) + b"".join(map(QUEUE_ENTRY.pack, queues))


def unpack_qreg(data: bytes) -> list[QueueEntry]:
    """Read the argument of QREG; `data` is as long as its count says."""
    entries = range(QREG_HEAD.size, len(data), QUEUE_ENTRY.size)
    return [QUEUE_ENTRY.unpack(data[at : at + QUEUE_ENTRY.size]) for at in entries]


def qreg_size(count: int) -> int:
    """Give the exact length of a QREG argument for `count` queues."""
    return QREG_HEAD.size + QUEUE_ENTRY.size * count


def text_of(field: bytes) -> str:
    """Decode a NUL-padded text field; bytes that are no UTF-8 are replaced."""
    return field.split(b"\0", 1)[0].decode(errors="replace")
