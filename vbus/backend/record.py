"""What outlives a backend's process of one connection: a memory file of the daemon's.

The daemon makes it with the connection, never looks into it, and gives it to each
process that works for the device, one after the other. A process writes into it as it
goes; the next one goes on from it, and believes it nothing it has not checked.

All numbers are little-endian. Version 1:

    0      magic u32 "VREC", version u32, size of the area u64
    16     commits u64; commit n is in slot n % 2, and none was made while this is 0
    64     two slots of SLOT_SIZE bytes, each: length u32, CRC-32 of the bytes u32,
           bytes: msgpack of `_Commit`
    4096 * 33
           the area: the device's own, see `Connection.area`; zeros at first

A commit is written into the slot that is not in use, and valid once `commits` says so:
a process that is killed leaves the old one or the new one.
"""

import os
import struct
import zlib
from typing import Final

import msgspec

from shm import AddressSpace, create_memfd
from vbus.errors import NoSpaceError, ProtocolError

MAGIC: Final = 0x43455256
VERSION: Final = 1
SLOT_SIZE: Final = 64 << 10
_AREA: Final = 4096 * 33
_HEAD: Final = struct.Struct("<IIQ")
_COMMITS: Final = struct.Struct("<Q")
_SLOT: Final = struct.Struct("<II")
_COMMITS_AT: Final = 16
_SLOTS_AT: Final = 64
_DATA_LIMIT: Final = SLOT_SIZE // 2


class _Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    call: int = 0
    """The call answered last, by the daemon's number; 0: none."""
    result: int = 0
    data: bytes = b""
    state: bytes = b""
    """The device's, as its `save` gave it."""


_ENCODER: Final = msgspec.msgpack.Encoder()
_READER: Final = msgspec.msgpack.Decoder(_Commit)


def create(size: int) -> int:
    """Make the memory file of a record; the descriptor is the caller's."""
    page = os.sysconf("SC_PAGESIZE")
    return create_memfd("vbus-record", -(-(_AREA + size) // page) * page)


class Record:
    """A record in the process that works with it now."""

    def __init__(self, fd: int, size: int, *, fresh: bool) -> None:
        """Map it; `size` is the area's, and `fresh` makes it a new one.

        The descriptor stays the caller's. Raises ProtocolError for what is none, and
        what AddressSpace does.
        """
        self._space = AddressSpace()
        length = os.fstat(fd).st_size
        self._space.map(0, length, fd)
        self._view = self._space.view(0, length)
        self._last = _Commit()
        self.area = AddressSpace()
        if size:
            self.area.map(0, length - _AREA, fd, _AREA)
        if fresh:
            self._view.write(0, _HEAD.pack(MAGIC, VERSION, size))
            self._commits = 0
        else:
            self._load(size)

    def _load(self, size: int) -> None:
        found = _HEAD.unpack(self._view.read(0, _HEAD.size))
        if found != (MAGIC, VERSION, size):
            raise ProtocolError("the record is not one of this device")
        (self._commits,) = _COMMITS.unpack(self._view.read(_COMMITS_AT, _COMMITS.size))
        if not self._commits:
            return
        at = self._slot(self._commits)
        length, crc = _SLOT.unpack(self._view.read(at, _SLOT.size))
        if length > SLOT_SIZE - _SLOT.size:
            raise ProtocolError("the record's state is too long")
        body = self._view.read(at + _SLOT.size, length)
        if zlib.crc32(body) != crc:
            raise ProtocolError("the record's state is damaged")
        try:
            self._last = _READER.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the record's state: {error}") from None

    @staticmethod
    def _slot(commit: int) -> int:
        return _SLOTS_AT + SLOT_SIZE * (commit % 2)

    @property
    def state(self) -> bytes:
        """The device's state at the last commit."""
        return self._last.state

    def answer(self, call: int) -> tuple[int, bytes] | None:
        """Give result and data of a call that was answered already."""
        last = self._last
        return (last.result, last.data) if call and call == last.call else None

    def save(self, state: bytes) -> None:
        """Commit a state. Raises NoSpaceError if it is too long."""
        if state != self._last.state or not self._commits:
            self._commit(msgspec.structs.replace(self._last, state=state))

    def answered(self, call: int, result: int, data: bytes, state: bytes) -> None:
        """Commit a call's answer, with what the state is then.

        An answer of more than 32 KiB is not kept: such a call may run twice.
        """
        if len(data) > _DATA_LIMIT:
            self.save(state)
        else:
            self._commit(_Commit(call, result, data, state))

    def _commit(self, commit: _Commit) -> None:
        body = _ENCODER.encode(commit)
        if len(body) > SLOT_SIZE - _SLOT.size:
            raise NoSpaceError(f"a state of {len(commit.state)} bytes is too long")
        number = (self._commits + 1) & 0xFFFF_FFFF_FFFF_FFFF
        head = _SLOT.pack(len(body), zlib.crc32(body))
        self._view.write(self._slot(number), head + body)
        self._view.write(_COMMITS_AT, _COMMITS.pack(number))
        self._commits, self._last = number, commit

    def close(self) -> None:
        """Unmap it."""
        self._space.clear()
        self.area.clear()
