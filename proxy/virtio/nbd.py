"""The NBD protocol from the server's side, as pure state machines: bytes in, bytes out.

Fixed newstyle handshake without TLS or structured replies, then transmission (the
protocol's public specification, doc/proto.md of the NBD project). Linux' own client
needs only the transmission.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from vbus.errors import ProtocolError

MAX_DATA: Final = 32 << 20
"""Bytes of one request; clients keep to it without being told (32 MiB)."""
_MAX_OPTION: Final = 8192
_MAGIC: Final = b"NBDMAGIC"
_OPTION_MAGIC: Final = b"IHAVEOPT"
_OPTION: Final = struct.Struct(">8sII")
_REPLY_MAGIC: Final = 0x3E889045565A9
_REPLY: Final = struct.Struct(">QIII")
_REQUEST_MAGIC: Final = 0x25609513
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE_MAGIC: Final = 0x67446698
_SIMPLE: Final = struct.Struct(">IIQ")
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2


class Flag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    CAN_MULTI_CONN = 256


class Command(IntEnum):
    """Requests of the transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1
    NO_HOLE = 2


class Error(IntEnum):
    """Error values on the wire."""

    NONE = 0
    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28


class _Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class _Answer(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 1 << 31 | 1
    ERR_INVALID = 1 << 31 | 3
    ERR_UNKNOWN = 1 << 31 | 6


_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3


@dataclass(frozen=True)
class Export:
    """What is served under a name; "" is the default for clients that ask for none."""

    name: str
    size: int
    flags: Flag
    block_size: int


@dataclass(frozen=True)
class Request:
    """One request; `kind` may be none that we know, `data` is what a WRITE carries."""

    kind: int
    flags: CommandFlag
    cookie: bytes
    offset: int
    size: int
    data: bytes = b""


class Handshake:
    """Agrees on an export. Send `greeting` first, then what `feed` returns."""

    greeting = _MAGIC + _OPTION_MAGIC + struct.pack(">H", _FIXED_NEWSTYLE | _NO_ZEROES)

    def __init__(self, export: Export) -> None:
        self.done = False
        """The transmission has begun; `rest` is what came of it already."""
        self.closed = False
        """The client wants to end it, once the answer is sent."""
        self.rest = b""
        self._export = export
        self._buffer = b""
        self._flags: int | None = None

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the client: the answer. Raises ProtocolError."""
        self._buffer += data
        answer = b""
        while not self.done and not self.closed:
            part = self._step()
            if part is None:
                break
            answer += part
        return answer

    def _step(self) -> bytes | None:
        if self._flags is None:
            if len(self._buffer) < 4:
                return None
            self._flags = int.from_bytes(self._take(4), "big")
            if self._flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
                raise ProtocolError(f"NBD client flags {self._flags:#x}")
            return b""
        if len(self._buffer) < _OPTION.size:
            return None
        magic, option, size = _OPTION.unpack_from(self._buffer)
        if magic != _OPTION_MAGIC or size > _MAX_OPTION:
            raise ProtocolError(f"NBD option {option} of {size} bytes")
        if len(self._buffer) < _OPTION.size + size:
            return None
        return self._option(option, self._take(_OPTION.size + size)[_OPTION.size :])

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _option(self, option: int, data: bytes) -> bytes:
        if option == _Option.EXPORT_NAME:
            return self._export_name(data)
        if option == _Option.ABORT:
            self.closed = True
            return _reply(option, _Answer.ACK)
        if option == _Option.LIST:
            name = self._export.name.encode()
            entry = struct.pack(">I", len(name)) + name
            return _reply(option, _Answer.SERVER, entry) + _reply(option, _Answer.ACK)
        if option in (_Option.INFO, _Option.GO):
            return self._info(option, data)
        return _reply(option, _Answer.ERR_UNSUP)

    def _export_name(self, data: bytes) -> bytes:
        if not self._knows(data):
            raise ProtocolError(f"no NBD export {data!r}")
        self._begin()
        assert self._flags is not None
        pad = b"" if self._flags & _NO_ZEROES else bytes(124)
        return struct.pack(">QH", self._export.size, self._export.flags) + pad

    def _info(self, option: int, data: bytes) -> bytes:
        size = int.from_bytes(data[:4], "big")
        if len(data) < 6 or len(data) < 6 + size:
            return _reply(option, _Answer.ERR_INVALID)
        if not self._knows(data[4 : 4 + size]):
            return _reply(option, _Answer.ERR_UNKNOWN)
        about, block = self._export, self._export.block_size
        export = struct.pack(">HQH", _INFO_EXPORT, about.size, about.flags)
        blocks = struct.pack(">HIII", _INFO_BLOCK_SIZE, block, 4096, MAX_DATA)
        if option == _Option.GO:
            self._begin()
        return (
            _reply(option, _Answer.INFO, export)
            + _reply(option, _Answer.INFO, blocks)
            + _reply(option, _Answer.ACK)
        )

    def _knows(self, name: bytes) -> bool:
        return name in (b"", self._export.name.encode())

    def _begin(self) -> None:
        self.done = True
        self.rest, self._buffer = self._buffer, b""


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data


class Transmission:
    """Cuts what the client sends into requests."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Request]:
        """Take bytes: the requests that are whole. Raises ProtocolError."""
        self._buffer += data
        requests = []
        while (request := self._next()) is not None:
            requests.append(request)
        return requests

    def _next(self) -> Request | None:
        if len(self._buffer) < _REQUEST.size:
            return None
        magic, flags, kind, cookie, at, size = _REQUEST.unpack_from(self._buffer)
        if magic != _REQUEST_MAGIC:
            raise ProtocolError(f"NBD request with magic {magic:#x}")
        carries = size if kind == Command.WRITE else 0
        if carries > MAX_DATA:
            raise ProtocolError(f"NBD write of {size} bytes")
        end = _REQUEST.size + carries
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_REQUEST.size : end])
        del self._buffer[:end]
        name = cookie.to_bytes(8, "big")
        return Request(kind, CommandFlag(flags), name, at, size, payload)


def answer(request: Request, error: Error = Error.NONE, data: bytes = b"") -> bytes:
    """Make the reply to a request; `data` is what a READ read."""
    cookie = int.from_bytes(request.cookie, "big")
    return _SIMPLE.pack(_SIMPLE_MAGIC, error, cookie) + data
