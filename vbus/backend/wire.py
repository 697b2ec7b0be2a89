"""The backend protocol's messages: a head, then one msgpack map. No I/O here.

    frame    length u32 and count of descriptors u16, little-endian; then that many
             bytes of msgpack, at most FRAME_LIMIT, tagged by "type"
    first    the backend says `Hello`, the daemon `Welcome`
    then     the daemon asks, each request with an id of its own, and the backend gives
             each exactly one `Reply`, in any order; by itself it says only `Failed` and
             `DeviceFailed`
    fds      go from the daemon to the backend, with the first byte of their message:
             one for each range of `Map`; the record of an `Open`; the doorbell and the
             bell of a `Share` with a signal; what was kept with a `Create`. From a
             backend comes one, with `Keep`; the daemon only keeps it.

Guests and connections have numbers that the daemon gives and never uses again. What a
number says is good for the backend it was said to, and nobody else.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from vbus.config import Isolation
from vbus.errors import InvalidError, ProtocolError

VERSION: Final = 2
DATA_LIMIT: Final = 1 << 20
FRAME_LIMIT: Final = DATA_LIMIT + 4096
MAX_FDS: Final = 64
CLASS_LIMIT: Final = 256
DEVICE_LIMIT: Final = 4096
AREA_LIMIT: Final = 64 << 20
HEAD: Final = struct.Struct("<IH")

T = TypeVar("T")
Name = Annotated[str, Meta(max_length=255)]
Id = Annotated[int, Meta(ge=0)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class AttributeInfo(_Struct, frozen=True):
    """One attribute of a device class."""

    name: Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9_]{0,62}\Z")]
    default: Any = None
    required: bool = False
    writable: bool = False
    doc: Annotated[str, Meta(max_length=1024)] = ""


class ClassInfo(_Struct, frozen=True):
    """A device class that a backend has."""

    name: Name
    type: Name
    version: Annotated[int, Meta(ge=0, lt=1 << 32)] = 1
    max_connections: Annotated[int, Meta(ge=0, lt=1 << 31)] = 1
    transparent: bool = False
    area_size: Annotated[int, Meta(ge=0, le=AREA_LIMIT)] = 0
    summary: Annotated[str, Meta(max_length=1024)] = ""
    attributes: tuple[AttributeInfo, ...] = ()


class DeviceInfo(_Struct, frozen=True):
    """A device that a backend brings along."""

    name: Name
    class_name: Name
    buses: tuple[Name, ...] = ()
    attributes: dict[str, Any] = {}


class Range(_Struct, frozen=True):
    """A range of guest addresses; `offset` is where it starts in its file."""

    address: int
    size: int
    offset: int
    writable: bool
    truncatable: bool


class Message(_Struct, frozen=True, tag_field="type", tag=str.lower):
    """What travels in a frame."""


# From the backend


class Hello(Message, frozen=True):
    """The first word: who it is, what it can make, what shall be there with it."""

    version: int
    name: Name = ""
    classes: Annotated[tuple[ClassInfo, ...], Meta(max_length=CLASS_LIMIT)] = ()
    devices: Annotated[tuple[DeviceInfo, ...], Meta(max_length=DEVICE_LIMIT)] = ()


class Reply(Message, frozen=True):
    """What became of request `id`: a result >= 0, or -errno and why."""

    id: Id
    result: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    data: Annotated[bytes, Meta(max_length=DATA_LIMIT)] = b""
    values: dict[str, Any] = {}
    message: Annotated[str, Meta(max_length=4096)] = ""


class Failed(Message, frozen=True):
    """A connection ended because of its ring or its device's bug; it is closed."""

    connection: Id
    message: Annotated[str, Meta(max_length=4096)] = ""


class DeviceFailed(Message, frozen=True):
    """A device's own task ended with an error; its connections are closed."""

    device: Name
    message: Annotated[str, Meta(max_length=4096)] = ""


class Keep(Message, frozen=True):
    """Give the descriptor that comes along to the next process, with the device.

    Without `comes` there is none any more.
    """

    device: Name
    comes: bool = True


# From the daemon


class Welcome(Message, frozen=True):
    """The answer to `Hello`: go on, under this name and isolated as it is said here.

    `devices` will be asked for by `Create`, for all that is known now; `paths` may be
    opened beside what those need.
    """

    version: int
    name: str
    isolation: Isolation = "auto"
    paths: tuple[str, ...] = ()
    devices: tuple[DeviceInfo, ...] = ()


class Refused(Message, frozen=True):
    """The other answer: why it cannot stay. The daemon hangs up after it."""

    message: str


class Cancel(Message, frozen=True):
    """Nobody waits for the reply to `request` any more; it still has to come."""

    request: int


class Request(Message, frozen=True):
    """What wants a Reply; the connection gives it its id."""

    id: int


class Ping(Request, frozen=True):
    """Are you there?"""


class Create(Request, frozen=True):
    """Make a device; `values` are its attributes then.

    The descriptor that an earlier process kept for it comes along.
    """

    device: str
    class_name: str
    attributes: dict[str, Any]


class Remove(Request, frozen=True):
    """Remove a device, or refuse because another one uses it."""

    device: str


class Change(Request, frozen=True):
    """Set an attribute; `values` are all of them then."""

    device: str
    attribute: str
    value: Any


class Count(Request, frozen=True):
    """Give the statistics of all devices, by name."""


class Map(Request, frozen=True):
    """Memory of a guest, one descriptor for each range; the first makes it known."""

    guest: int
    guest_name: str
    ranges: tuple[Range, ...]


class Unmap(Request, frozen=True):
    """The guest took memory back: no byte of it is mapped once this is answered."""

    guest: int
    address: int
    size: int


class Forget(Request, frozen=True):
    """The guest has nothing open here any more: unmap all, once more."""

    guest: int


class Open(Request, frozen=True):
    """A guest, whose memory came before, opens a device.

    A transparent one gets the descriptor of its record, with `area` bytes for itself.
    With `resumes` the guest has it open: its memories are shared next, and only
    `Resume` wakes the device.
    """

    connection: int
    guest: int
    device: str
    version: int
    area: int | None = None
    resumes: bool = False


class Resume(Request, frozen=True):
    """All memories of a connection that is resumed were shared: go on."""

    connection: int


class Share(Request, frozen=True):
    """Memory `shm` of a connection; with a signal, descriptors of both ways come along.

    The backend waits on the doorbell, and rings the bell to have the guest told.
    """

    connection: int
    shm: int
    address: int
    size: int
    flags: int
    signal_offset: int | None
    priority: int
    cookie: int


class Call(Request, frozen=True):
    """DEVCALL, with a copy of the guest's data.

    A transparent device gets one after the other, with a `number` that grows: what was
    answered already is answered again from the record.
    """

    connection: int
    function: int
    data: bytes
    flags: int
    number: int = 0


class Close(Request, frozen=True):
    """The guest closes: answered when the device has let go of it."""

    connection: int


class End(Request, frozen=True):
    """Over, for whatever reason: no byte of the guest's is touched once answered.

    For a connection that is unknown, or closed already, there is nothing to do.
    """

    connection: int


FromBackend = Hello | Reply | Failed | DeviceFailed | Keep
FromDaemon = (
    Welcome
    | Refused
    | Cancel
    | Ping
    | Create
    | Remove
    | Change
    | Count
    | Map
    | Unmap
    | Forget
    | Open
    | Resume
    | Share
    | Call
    | Close
    | End
)

_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(message: Message, fds: int = 0) -> bytes:
    """Make a frame. Raises InvalidError over the limits, or for what has no msgpack."""
    try:
        body = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidError(f"no message: {error}") from None
    if len(body) > FRAME_LIMIT or fds > MAX_FDS:
        raise InvalidError(f"a message of {len(body)} bytes with {fds} descriptors")
    return HEAD.pack(len(body), fds) + body


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame's body, and the descriptors that are to come with it."""

    body: bytes
    fds: int


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def begun(self) -> bool:
        """Is there a frame that is not whole?"""
        return bool(self._buffer)

    @property
    def missing(self) -> int:
        """Bytes that the frame under way still lacks; 0 if it has no head yet."""
        if len(self._buffer) < HEAD.size:
            return 0
        length, _ = HEAD.unpack_from(self._buffer)
        return int(HEAD.size + length - len(self._buffer))

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes, give each frame that is whole. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            length, fds = HEAD.unpack_from(self._buffer)
            if length > FRAME_LIMIT or fds > MAX_FDS:
                raise ProtocolError(f"a frame of {length} bytes with {fds} descriptors")
            end = HEAD.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEAD.size : end])
            del self._buffer[:end]
            yield Frame(body, fds)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make a decoder of FromBackend or FromDaemon."""
    return msgspec.msgpack.Decoder(kind)


def decode(body: bytes, reader: "msgspec.msgpack.Decoder[T]") -> T:
    """Read a body. Raises ProtocolError."""
    try:
        return reader.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"bad message: {error}") from None
