"""The control protocol's messages: a length, then one msgpack map. No I/O here.

    frame    length u32 little-endian, then that many bytes of msgpack, at most 1 MiB
    request  {"version": 1, "id": n, "op": "device.add", "args": {...}}
    reply    {"id": n, "result": ...}, or
             {"id": n, "error": {"errno": "EEXIST", "message": "..."}}
    event    {"id": n, "event": {...}}, any number of them after the reply to a stream
    part     {"id": n, "part": bytes}: a reply over 1 MiB comes in slices of its
             msgpack, and {"id": n, "parts": how many} after them

What an op takes and gives is in `operations` and `streams`.
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
PART_SIZE = FRAME_LIMIT - 64
PARTS_LIMIT = 256
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
    part: bytes | None = None
    parts: int = 0


def encode(message: Request | Answer) -> bytes:
    """Make a frame. Raises ProtocolError if it is over the limit, or has no msgpack."""
    body = _pack(message)
    if len(body) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(body)} bytes is over {FRAME_LIMIT}")
    return _frame(body)


def encode_answer(answer: Answer) -> Iterator[bytes]:
    """Make the frames of an answer of any size. Raises ProtocolError at the first."""
    body = _pack(answer)
    if len(body) <= FRAME_LIMIT:
        yield _frame(body)
        return
    starts = range(0, len(body), PART_SIZE)
    if len(starts) > PARTS_LIMIT:
        raise ProtocolError(f"an answer of {len(body)} bytes is too long")
    for start in starts:
        yield encode(Answer(answer.id, part=body[start : start + PART_SIZE]))
    yield encode(Answer(answer.id, parts=len(starts)))


def _pack(message: Request | Answer) -> bytes:
    try:
        plain = msgspec.to_builtins(message, builtin_types=(bytes,))
        body: bytes = msgpack.packb(plain)
    except (ValueError, OverflowError, TypeError) as error:
        raise ProtocolError(f"no message: {error}") from None
    return body


def _frame(body: bytes) -> bytes:
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


class Answers:
    """Puts the parts of long answers together again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def take(self, body: bytes) -> Answer | None:
        """Take a body; give the answer if it is whole. Raises ProtocolError."""
        answer = to_answer(body)
        if answer.part is not None:
            if len(self._parts) == PARTS_LIMIT:
                raise ProtocolError(f"an answer of more than {PARTS_LIMIT} parts")
            self._parts.append(answer.part)
            return None
        if not answer.parts:
            return answer
        parts, self._parts = self._parts, []
        if len(parts) != answer.parts:
            raise ProtocolError(f"{len(parts)} parts instead of {answer.parts}")
        return to_answer(b"".join(parts))


def _convert(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.convert(
            msgpack.unpackb(body, strict_map_key=True), kind, builtin_types=(bytes,)
        )
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
