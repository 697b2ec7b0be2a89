"""The control protocol's messages: a length, then one msgpack map. No I/O here.

    frame    length u32 little-endian, then that many bytes of msgpack, at most 1 MiB
    request  {"version": 1, "id": n, "op": "device.add", "args": {...}}
    reply    {"id": n, "result": ...}, or
             {"id": n, "error": {"errno": "EEXIST", "message": "..."}}
    event    {"id": n, "event": {...}}, any number of them after the reply to "events"

What an op takes and gives is in `operations`.
"""

import struct
from collections.abc import Iterator
from typing import TypeVar

import msgpack
import msgspec

from vbus.errors import ProtocolError

T = TypeVar("T")
VERSION = 1
FRAME_LIMIT = 1 << 20
_LENGTH = struct.Struct("<I")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client asks."""

    version: int
    id: int
    op: str
    args: dict[str, object] = {}


class Failure(msgspec.Struct, frozen=True):
    """Why a request was refused: an errno's name and a sentence."""

    errno: str
    message: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the daemon says: the one field that counts is not None."""

    id: int
    result: object = None
    error: Failure | None = None
    event: dict[str, object] | None = None


def encode(message: Request | Answer) -> bytes:
    """Make a frame. Raises ProtocolError if it is over the limit."""
    body: bytes = msgpack.packb(msgspec.to_builtins(message))
    if len(body) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(body)} bytes is over {FRAME_LIMIT}")
    return _LENGTH.pack(len(body)) + body


def to_request(body: bytes) -> Request:
    """Read a request. Raises ProtocolError."""
    request = _convert(body, Request)
    if request.version != VERSION:
        raise ProtocolError(f"version {request.version}, but this daemon has {VERSION}")
    return request


def to_answer(body: bytes) -> Answer:
    """Read an answer. Raises ProtocolError."""
    return _convert(body, Answer)


def _convert(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.convert(msgpack.unpackb(body, strict_map_key=True), kind)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ProtocolError(f"bad message: {reason}") from None


class Frames:
    """Cuts a stream of bytes into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes, give each body that is whole. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > FRAME_LIMIT:
                raise ProtocolError(f"a frame of {length} bytes is over {FRAME_LIMIT}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body
