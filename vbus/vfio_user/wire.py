"""vfio-user framing without I/O, for both ends of a connection.

Feed what was received, with the descriptors that came along, and get whole messages;
ask for requests, replies and errors and get bytes to send. Descriptors are numbers
here: this module never uses or closes one.

What each command carries is in `messages`, the numbers are in `constants`; both are
to be had from here.
"""

import errno as _errno
import os
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vbus.errors import BusyError, InvalidError, ProtocolError
from vbus.vfio_user.constants import (
    HEADER_SIZE,
    IRQ_SET_ACTIONS,
    IRQ_SET_DATA,
    MAX_DATA_XFER_SIZE,
    MAX_DMA_MAPS,
    MAX_MESSAGE_SIZE,
    MAX_MSG_FDS,
    PAGE_SIZES,
    SCM_MAX_FD,
    TYPE_MASK,
    VERSION_MAJOR,
    VERSION_MINOR,
    WRITE_MULTI_MAX,
    Command,
    DeviceFlag,
    DmaFlag,
    Flag,
    IoEventFdFlag,
    IoFdType,
    IrqInfoFlag,
    IrqSetFlag,
    RegionFlag,
    UnmapFlag,
)
from vbus.vfio_user.messages import (
    INFO_SIZE,
    IO_FD_SIZE,
    REGION_INFO_SIZE,
    Capabilities,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    SubRegion,
    Version,
    WriteMulti,
    pack_write_multi_reply,
    unpack_write_multi_reply,
)

_HEADER = struct.Struct("<HHIII")
_IDS = 1 << 16
# As plain numbers: the flag classes are slow, and these are used for every message.
_REPLY = int(Flag.REPLY)
_NO_REPLY = int(Flag.NO_REPLY)
_ERROR = int(Flag.ERROR)


class Message(NamedTuple):
    """One received message. Its owner closes `fds`."""

    id: int
    command: int
    flags: int
    error: int
    body: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        return self.flags & TYPE_MASK == _REPLY

    @property
    def wants_reply(self) -> bool:
        """Is this a request that is to be answered?"""
        return not self.flags & (TYPE_MASK | _NO_REPLY)

    @property
    def failed(self) -> bool:
        """Is this an error reply? Then `error` is an errno, or 0 for an unnamed one."""
        return bool(self.flags & _ERROR)


def command_name(command: int) -> str:
    """Name a command for a log line, also one that does not exist."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def error_name(code: int) -> str:
    """Name an errno for a message: "EBUSY (Device or resource busy)"."""
    name = _errno.errorcode.get(code, str(code))
    return f"{name} ({os.strerror(code)})" if code in _errno.errorcode else name


class Connection:
    """One end of one connection, client or server.

    A ProtocolError ends the connection: nothing can be fed any more. All descriptors
    that were fed belong to the messages returned; those of a message that is not
    complete, or was lost in a ProtocolError, are handed out by `abandon`.
    """

    def __init__(
        self,
        *,
        max_message_size: int = MAX_MESSAGE_SIZE,
        max_fds: int = MAX_MSG_FDS,
    ) -> None:
        self.max_message_size = max_message_size
        self.max_fds = max_fds
        self.broken: str | None = None
        self._partial = bytearray()
        self._needed = HEADER_SIZE
        self._fds: list[int] = []
        self._next_id = 0
        self._outstanding: dict[int, int] = {}

    # Receiving

    @property
    def missing(self) -> int:
        """How many bytes are missing at least until the next message is whole."""
        return self._needed - len(self._partial)

    @property
    def outstanding(self) -> int:
        """How many of our requests have not been answered."""
        return len(self._outstanding)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """Take received bytes and return the messages that are whole now.

        Descriptors belong to the last message of which `data` holds a part: the kernel
        ends a receive with the piece that carries them, and each message is sent by
        itself. Raises ProtocolError.
        """
        messages: list[Message] = []
        try:
            self._feed(data, fds, messages)
        except ProtocolError as error:
            self.broken = str(error)
            for message in messages:
                self._fds.extend(message.fds)
            self._fds.extend(fds)
            raise
        return messages

    def abandon(self) -> list[int]:
        """Give up the descriptors no returned message owns; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    @property
    def partial(self) -> tuple[bytes, tuple[int, ...]]:
        """Bytes of a message that is not complete, and its descriptors."""
        return bytes(self._partial), tuple(self._fds)

    @property
    def requests(self) -> tuple[int, dict[int, int]]:
        """Our next id, and the command of each request that is not answered."""
        return self._next_id, dict(self._outstanding)

    def resume(self, next_id: int, outstanding: Mapping[int, int]) -> None:
        """Go on where another one was with its requests."""
        self._next_id = next_id % _IDS
        self._outstanding.update(outstanding)

    def _feed(self, data: bytes, fds: Sequence[int], messages: list[Message]) -> None:
        if self.broken is not None:
            raise ProtocolError(self.broken)
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                self._hold(fds)
                return
            data = bytes(self._partial)
        rest = self._split(data, messages)
        if self._partial or rest < len(data):
            self._partial = bytearray(data[rest:])
        if fds:
            self._assign(messages, fds)

    def _split(self, data: bytes, messages: list[Message]) -> int:
        """Cut whole messages off `data`; return where the rest begins."""
        at, end = 0, len(data)
        while end - at >= HEADER_SIZE:
            ident, command, size, flags, error = _HEADER.unpack_from(data, at)
            if not HEADER_SIZE <= size <= self.max_message_size:
                raise ProtocolError(f"a message of {size} bytes")
            kind = flags & TYPE_MASK
            if kind > _REPLY:
                raise ProtocolError(f"a message of type {kind}")
            if end - at < size:
                self._needed = size
                return at
            if kind:
                self._match(ident, command)
            fds: tuple[int, ...] = ()
            if self._fds:
                fds = tuple(self.abandon())
            body = data[at + HEADER_SIZE : at + size]
            messages.append(Message(ident, command, flags, error, body, fds))
            at += size
        self._needed = HEADER_SIZE
        return at

    def _match(self, ident: int, command: int) -> None:
        """Check a reply against our requests."""
        expected = self._outstanding.pop(ident, None)
        if expected is None:
            raise ProtocolError(f"a reply to no request of ours (id {ident})")
        if expected != command:
            raise ProtocolError(
                f"a reply to {command_name(command)} where"
                f" {command_name(expected)} was asked (id {ident})"
            )

    def _assign(self, messages: list[Message], fds: Sequence[int]) -> None:
        if self._partial or not messages:
            self._hold(fds)
            return
        last = messages[-1]
        self._check_fds(len(last.fds) + len(fds))
        messages[-1] = last._replace(fds=(*last.fds, *fds))

    def _hold(self, fds: Sequence[int]) -> None:
        """Keep descriptors for the message that is not complete yet."""
        self._check_fds(len(self._fds) + len(fds))
        self._fds.extend(fds)

    def _check_fds(self, count: int) -> None:
        if count > self.max_fds:
            raise ProtocolError(f"a message with more than {self.max_fds} descriptors")

    # Sending

    def request(
        self, command: int, body: bytes = b"", *, no_reply: bool = False
    ) -> tuple[int, bytes]:
        """Make a request; return its id, by which the reply is known, and the bytes.

        Raises InvalidError if it is larger than messages may be and BusyError if all
        ids are in use.
        """
        size = HEADER_SIZE + len(body)
        if size > self.max_message_size:
            raise InvalidError(f"{command_name(command)} of {size} bytes is too large")
        ident = self._new_id()
        if not no_reply:
            self._outstanding[ident] = command
        flags = _NO_REPLY if no_reply else 0
        return ident, _HEADER.pack(ident, command, size, flags, 0) + body

    def _new_id(self) -> int:
        if len(self._outstanding) >= _IDS - 1:
            raise BusyError("65535 requests are waiting for a reply")
        ident = self._next_id
        while ident in self._outstanding:
            ident = (ident + 1) % _IDS
        self._next_id = (ident + 1) % _IDS
        return ident


def reply(request: Message, body: bytes = b"") -> bytes:
    """Answer a request."""
    size = HEADER_SIZE + len(body)
    return _HEADER.pack(request.id, request.command, size, _REPLY, 0) + body


def error_reply(request: Message, code: int) -> bytes:
    """Refuse a request with an errno, given as a positive number."""
    return _HEADER.pack(request.id, request.command, HEADER_SIZE, _REPLY | _ERROR, code)


__all__ = [
    "HEADER_SIZE",
    "INFO_SIZE",
    "IO_FD_SIZE",
    "IRQ_SET_ACTIONS",
    "IRQ_SET_DATA",
    "MAX_DATA_XFER_SIZE",
    "MAX_DMA_MAPS",
    "MAX_MESSAGE_SIZE",
    "MAX_MSG_FDS",
    "PAGE_SIZES",
    "REGION_INFO_SIZE",
    "SCM_MAX_FD",
    "VERSION_MAJOR",
    "VERSION_MINOR",
    "WRITE_MULTI_MAX",
    "Capabilities",
    "Command",
    "Connection",
    "DeviceFlag",
    "DeviceInfo",
    "DmaAccess",
    "DmaFlag",
    "DmaMap",
    "DmaUnmap",
    "Flag",
    "IoEventFdFlag",
    "IoFdType",
    "IrqInfo",
    "IrqInfoFlag",
    "IrqSetFlag",
    "Message",
    "RegionAccess",
    "RegionFlag",
    "RegionInfo",
    "RegionIoFds",
    "SetIrqs",
    "SubRegion",
    "UnmapFlag",
    "Version",
    "WriteMulti",
    "command_name",
    "error_name",
    "error_reply",
    "pack_write_multi_reply",
    "reply",
    "unpack_write_multi_reply",
]
