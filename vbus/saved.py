"""The saved state: all that one daemon tells the next, as one msgpack map in a memfd.

    {"version": 1, "config": {...}, "running": {...}}

`config` is the configuration of all there was, as `vbus.config.to_document` gives it.
It is all that is left after a crash. `running` is what a daemon that replaces itself
adds: the sessions of its guests. Descriptors stand in it as indices into those that
come along (`Held`), each of them once.

The map is read as a stranger's: types and bounds here, what it means where it is put to
use, with the very checks that a guest's own requests get.
"""

import fcntl
import os
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from vbus.errors import InvalidError

VERSION: Final = 1
LIMIT: Final = 64 << 20
"""Bytes of a state at most."""
_SEALS = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
)

Fd = Annotated[int, Meta(ge=0, lt=1 << 20)]
"""An index into the descriptors that come along."""
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, Meta(ge=0)]
"""Up to 2^64: as much as msgpack can say."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of what is saved."""


class SavedShm(Struct, frozen=True):
    """Memory shared on a connection; the signal's fields if it has one."""

    id: U32
    addr: U64
    size: U64
    flags: U32
    prio: U32 = 0
    cookie: U64 = 0
    signal_offset: U32 | None = None
    handle: U32 | None = None
    doorbell: Fd | None = None


class SavedConnection(Struct, frozen=True):
    """An open device; `state` is the device's own, and the memory file `area`."""

    device: str
    version: U32
    handle: U64
    shm: tuple[SavedShm, ...]
    state: bytes = b""
    area: Fd | None = None


class SavedQueue(Struct, frozen=True):
    """An event queue as QREG said, and the eventfd a client may ring for it."""

    descriptors: U32
    ring: U64
    data: U64
    doorbell: Fd


class SavedEvent(Struct, frozen=True):
    """An event that waits; that of a signal is known by the signal's handle."""

    record: bytes
    priority: U32
    signal: U32 | None = None


class SavedSession(Struct, frozen=True):
    """What NEGOTIATE made. `channels`: descriptor's address by id of fast call."""

    capabilities: U32
    next_signal: U32
    channels: dict[U32, U64]
    queues: tuple[SavedQueue, ...]
    connections: tuple[SavedConnection, ...]
    events: tuple[SavedEvent, ...]


class SavedRange(Struct, frozen=True):
    """A range of guest memory; without a descriptor only its address is known."""

    addr: U64
    size: U64
    offset: U64
    writable: bool
    truncatable: bool
    fd: Fd | None


class SavedBridge(Struct, frozen=True):
    """The function: registers, guest memory, and the session if there is one."""

    memory: tuple[SavedRange, ...]
    config: bytes
    msix: bytes
    calls: bytes
    session: SavedSession | None


class SavedInterrupts(Struct, frozen=True):
    """What SET_IRQS set up, by IRQ index and vector."""

    eventfds: tuple[tuple[U32, U32, Fd], ...]
    masked: tuple[tuple[U32, U32], ...]
    pending: tuple[tuple[U32, U32], ...]


class SavedStream(Struct, frozen=True):
    """A connection's bytes under way: half a message, and replies not taken yet."""

    socket: Fd
    partial: bytes
    partial_fds: tuple[Fd, ...]
    unsent: tuple[tuple[bytes, tuple[Fd, ...]], ...]
    next_id: U32
    outstanding: dict[U32, U32]


class SavedClient(Struct, frozen=True):
    """A client of vfio-user that has said its VERSION."""

    stream: SavedStream
    max_msg_fds: U32
    max_data_xfer_size: U64
    interrupts: SavedInterrupts
    bridge: SavedBridge


class SavedBus(Struct, frozen=True):
    """A bus's ids: the devices whose connections go on, and the next to be given."""

    next_id: U64
    devices: dict[str, U32]


class Running(Struct, frozen=True):
    """The daemon as it ran; `lock` is the descriptor that holds its directory."""

    lock: Fd
    buses: dict[str, SavedBus]
    guests: dict[str, SavedClient]
    descriptors: dict[str, Fd] = {}
    """What devices keep for their next process, a TAP for one."""
    stored: tuple[str, ...] = ()
    """By what names the service manager has older states."""


class State(Struct, frozen=True):
    """All of it."""

    config: dict[str, Any]
    running: Running | None = None
    version: int = VERSION


class _Head(msgspec.Struct):
    """What every version has."""

    version: int


class Held:
    """Descriptors that go from one daemon to the next, in their order."""

    def __init__(self, fds: Sequence[int] = ()) -> None:
        """Own `fds`."""
        self._fds: list[int | None] = list(fds)

    def take(self, index: int) -> int:
        """Hand one over to the caller. Raises InvalidError: not there any more."""
        fd = self._fds[index] if index < len(self._fds) else None
        if fd is None:
            raise InvalidError(f"the saved state has no descriptor {index} to give")
        self._fds[index] = None
        return fd

    def close(self) -> None:
        """Close what nobody took."""
        for index, fd in enumerate(self._fds):
            if fd is not None:
                self._fds[index] = None
                os.close(fd)


class Kept:
    """The same while they are collected: they stay their owners'."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def keep(self, fd: int) -> int:
        """Take one along; gives its index."""
        self.fds.append(fd)
        return len(self.fds) - 1


def write(state: State) -> int:
    """Make the memfd; the caller owns it. Raises OSError."""
    data = msgspec.msgpack.encode(state)
    fd = os.memfd_create("vbus-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(fd: int) -> State:
    """Read a memfd, which stays the caller's. Raises InvalidError for any other."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise InvalidError("the saved state is not sealed")
        size = os.fstat(fd).st_size
        if size > LIMIT:
            raise InvalidError(f"a saved state of {size} bytes")
        return parse(os.pread(fd, size, 0))
    except OSError as error:
        raise InvalidError(f"the saved state is no memfd: {error.strerror}") from None


def parse(data: bytes) -> State:
    """Take the bytes of a state. Raises InvalidError."""
    try:
        version = msgspec.msgpack.decode(data, type=_Head).version
        if version != VERSION:
            raise InvalidError(
                f"the saved state has version {version}, this daemon knows {VERSION}"
            )
        return msgspec.msgpack.decode(data, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidError(f"the saved state cannot be read: {error}") from None
