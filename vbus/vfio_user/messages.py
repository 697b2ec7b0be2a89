"""What vfio-user messages carry: one tuple per payload, packed and unpacked.

`unpack` checks lengths and counts against the bytes that are there and raises
InvalidError, so that a bad payload can be answered with EINVAL; what the values mean
is checked by whoever uses them. `argsz` fields are filled in when packing.
"""

import struct
from collections.abc import Sequence
from typing import Annotated, NamedTuple, Self

import msgspec

from vbus.errors import InvalidError
from vbus.vfio_user.constants import (
    MAX_DATA_XFER_SIZE,
    MAX_DMA_MAPS,
    PAGE_SIZES,
    REGION_CAP_SPARSE_MMAP,
    WRITE_MULTI_MAX,
    RegionFlag,
)

_VERSION = struct.Struct("<HH")
_DMA_MAP = struct.Struct("<IIQQQ")
_DMA_UNMAP = struct.Struct("<IIQQ")
_FOUR = struct.Struct("<IIII")
_REGION_INFO = struct.Struct("<IIIIQQ")
_SPARSE = struct.Struct("<HHIII")
_AREA = struct.Struct("<QQ")
_IO_FD = struct.Struct("<QQIIIIQ")
_SET_IRQS = struct.Struct("<IIIII")
_ACCESS = struct.Struct("<QII")
_DMA = struct.Struct("<QQ")
_COUNT = struct.Struct("<Q")
_ONE_WRITE = struct.Struct("<QII8s")

INFO_SIZE = _FOUR.size
REGION_INFO_SIZE = _REGION_INFO.size
IO_FD_SIZE = _IO_FD.size

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


def _require(body: bytes, size: int, what: str) -> None:
    if len(body) < size:
        raise InvalidError(f"{what} has {len(body)} bytes and needs {size}")


class Capabilities(msgspec.Struct, frozen=True):
    """What one end can take; the defaults are the protocol's for an absent name."""

    max_msg_fds: Natural = 1
    max_data_xfer_size: Natural = MAX_DATA_XFER_SIZE
    max_dma_maps: Natural = MAX_DMA_MAPS
    pgsizes: Natural = PAGE_SIZES
    write_multiple: bool = False


class _VersionData(msgspec.Struct, frozen=True):
    capabilities: Capabilities = Capabilities()


_version_data = msgspec.json.Decoder(_VersionData)


class Version(NamedTuple):
    """VERSION, both ways."""

    major: int
    minor: int
    capabilities: Capabilities = Capabilities()

    def pack(self) -> bytes:
        data = msgspec.json.encode(_VersionData(self.capabilities))
        return _VERSION.pack(self.major, self.minor) + data + b"\0"

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _VERSION.size, "VERSION")
        major, minor = _VERSION.unpack_from(body)
        text = body[_VERSION.size :]
        if not text:
            return cls(major, minor)
        if not text.endswith(b"\0"):
            raise InvalidError("the capabilities of VERSION do not end with NUL")
        try:
            data = _version_data.decode(text.rstrip(b"\0") or b"{}")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidError(f"the capabilities of VERSION: {error}") from error
        return cls(major, minor, data.capabilities)


class DmaMap(NamedTuple):
    """DMA_MAP request; the reply is empty."""

    flags: int
    offset: int
    address: int
    size: int

    def pack(self) -> bytes:
        return _DMA_MAP.pack(_DMA_MAP.size, *self)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _DMA_MAP.size, "DMA_MAP")
        return cls(*_DMA_MAP.unpack_from(body)[1:])


class DmaUnmap(NamedTuple):
    """DMA_UNMAP; the reply repeats the request."""

    flags: int
    address: int
    size: int

    def pack(self) -> bytes:
        return _DMA_UNMAP.pack(_DMA_UNMAP.size, *self)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _DMA_UNMAP.size, "DMA_UNMAP")
        return cls(*_DMA_UNMAP.unpack_from(body)[1:])


class DeviceInfo(NamedTuple):
    """DEVICE_GET_INFO; a request has zeros. `argsz` is the room for the reply."""

    flags: int = 0
    regions: int = 0
    irqs: int = 0
    argsz: int = INFO_SIZE

    def pack(self) -> bytes:
        return _FOUR.pack(self.argsz, self.flags, self.regions, self.irqs)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _FOUR.size, "DEVICE_GET_INFO")
        argsz, flags, regions, irqs = _FOUR.unpack_from(body)
        return cls(flags, regions, irqs, argsz)


class RegionInfo(NamedTuple):
    """DEVICE_GET_REGION_INFO; a request has a region and the room for the reply.

    `areas` are the (offset, size) of the mappable parts: the sparse-mmap capability.
    """

    region: int
    flags: int = 0
    size: int = 0
    offset: int = 0
    areas: tuple[tuple[int, int], ...] = ()
    argsz: int = REGION_INFO_SIZE

    @property
    def full_size(self) -> int:
        """Bytes the payload takes with its capabilities."""
        if not self.areas:
            return REGION_INFO_SIZE
        return REGION_INFO_SIZE + _SPARSE.size + _AREA.size * len(self.areas)

    def pack(self) -> bytes:
        """Pack a request, or a reply without capabilities."""
        return _REGION_INFO.pack(
            self.argsz, self.flags, self.region, 0, self.size, self.offset
        )

    def pack_reply(self, room: int) -> bytes:
        """Pack a reply; capabilities that do not fit into `room` are left out.

        The client learns from argsz how much room it takes and asks again.
        """
        full = self.full_size
        if not self.areas or room < full:
            return self._replace(argsz=full).pack()
        flags, at = self.flags | RegionFlag.CAPS, REGION_INFO_SIZE
        head = _REGION_INFO.pack(full, flags, self.region, at, self.size, self.offset)
        capability = _SPARSE.pack(REGION_CAP_SPARSE_MMAP, 1, 0, len(self.areas), 0)
        return head + capability + b"".join(_AREA.pack(*area) for area in self.areas)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _REGION_INFO.size, "DEVICE_GET_REGION_INFO")
        argsz, flags, region, at, size, offset = _REGION_INFO.unpack_from(body)
        areas = _sparse_areas(body, at) if flags & RegionFlag.CAPS and at else ()
        return cls(region, flags, size, offset, areas, argsz)


def _sparse_areas(body: bytes, at: int) -> tuple[tuple[int, int], ...]:
    """Walk the capabilities, forwards only so that the walk ends."""
    while at:
        _require(body, at + 8, "a region capability")
        kind, _version, following = struct.unpack_from("<HHI", body, at)
        if kind == REGION_CAP_SPARSE_MMAP:
            _require(body, at + _SPARSE.size, "the sparse-mmap capability")
            count = _SPARSE.unpack_from(body, at)[3]
            start = at + _SPARSE.size
            end = start + count * _AREA.size
            _require(body, end, "the sparse-mmap capability")
            return tuple(
                (offset, size) for offset, size in _AREA.iter_unpack(body[start:end])
            )
        if following and following <= at:
            raise InvalidError("the region capabilities run backwards")
        at = following
    return ()


class SubRegion(NamedTuple):
    """A part of a region that has a descriptor of its own."""

    offset: int
    size: int
    fd_index: int
    type: int
    flags: int
    datamatch: int


class RegionIoFds(NamedTuple):
    """DEVICE_GET_REGION_IO_FDS; a request has a region and the room for the reply."""

    region: int
    subregions: tuple[SubRegion, ...] = ()
    total: int = 0
    argsz: int = INFO_SIZE

    def pack(self) -> bytes:
        """Pack a request, or the reply that only tells how much room it takes."""
        return _FOUR.pack(self.argsz, 0, self.region, self.total)

    @classmethod
    def pack_reply(cls, region: int, subregions: Sequence[SubRegion]) -> bytes:
        size = INFO_SIZE + IO_FD_SIZE * len(subregions)
        return cls(region, total=len(subregions), argsz=size).pack() + b"".join(
            _IO_FD.pack(*sub[:5], 0, sub.datamatch) for sub in subregions
        )

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Unpack either way; a reply that did not fit has a total and no list."""
        _require(body, INFO_SIZE, "DEVICE_GET_REGION_IO_FDS")
        argsz, _flags, region, total = _FOUR.unpack_from(body)
        if len(body) == INFO_SIZE:
            return cls(region, (), total, argsz)
        end = INFO_SIZE + total * IO_FD_SIZE
        _require(body, end, "DEVICE_GET_REGION_IO_FDS")
        subregions = tuple(
            SubRegion(offset, size, fd_index, kind, flags, match)
            for offset, size, fd_index, kind, flags, _, match in _IO_FD.iter_unpack(
                body[INFO_SIZE:end]
            )
        )
        return cls(region, subregions, total, argsz)


class IrqInfo(NamedTuple):
    """DEVICE_GET_IRQ_INFO; a request has an IRQ index and the room for the reply."""

    irq: int
    flags: int = 0
    vectors: int = 0
    argsz: int = INFO_SIZE

    def pack(self) -> bytes:
        return _FOUR.pack(self.argsz, self.flags, self.irq, self.vectors)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _FOUR.size, "DEVICE_GET_IRQ_INFO")
        argsz, flags, irq, vectors = _FOUR.unpack_from(body)
        return cls(irq, flags, vectors, argsz)


class SetIrqs(NamedTuple):
    """DEVICE_SET_IRQS request; eventfds travel beside it. The reply is empty."""

    flags: int
    irq: int
    start: int
    vectors: int
    data: bytes = b""

    def pack(self) -> bytes:
        size = _SET_IRQS.size + len(self.data)
        return _SET_IRQS.pack(size, *self[:4]) + self.data

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _SET_IRQS.size, "DEVICE_SET_IRQS")
        _argsz, flags, irq, start, vectors = _SET_IRQS.unpack_from(body)
        return cls(flags, irq, start, vectors, body[_SET_IRQS.size :])


class RegionAccess(NamedTuple):
    """REGION_READ and REGION_WRITE, both ways.

    Data is there in a write's request and in a read's reply.
    """

    offset: int
    region: int
    size: int
    data: bytes = b""

    def pack(self) -> bytes:
        return _ACCESS.pack(self.offset, self.region, self.size) + self.data

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Unpack a message without data."""
        _require(body, _ACCESS.size, "a region access")
        return cls(*_ACCESS.unpack_from(body))

    @classmethod
    def unpack_data(cls, body: bytes) -> Self:
        """Unpack a message with `size` bytes of data."""
        _require(body, _ACCESS.size, "a region access")
        offset, region, size = _ACCESS.unpack_from(body)
        data = body[_ACCESS.size :]
        if len(data) != size:
            raise InvalidError(f"a region access of {size} bytes has {len(data)}")
        return cls(offset, region, size, data)


class WriteMulti(NamedTuple):
    """REGION_WRITE_MULTI request: writes of at most 8 bytes. The reply is a count."""

    writes: tuple[RegionAccess, ...]

    def pack(self) -> bytes:
        return _COUNT.pack(len(self.writes)) + b"".join(
            _ONE_WRITE.pack(*write) for write in self.writes
        )

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        _require(body, _COUNT.size, "REGION_WRITE_MULTI")
        (count,) = _COUNT.unpack_from(body)
        rest = body[_COUNT.size :]
        if count > WRITE_MULTI_MAX or len(rest) != count * _ONE_WRITE.size:
            raise InvalidError(f"REGION_WRITE_MULTI: {count} in {len(rest)} bytes")
        writes = []
        for offset, region, size, data in _ONE_WRITE.iter_unpack(rest):
            if size > len(data):
                raise InvalidError(f"REGION_WRITE_MULTI: a write of {size} bytes")
            writes.append(RegionAccess(offset, region, size, data[:size]))
        return cls(tuple(writes))


def pack_write_multi_reply(done: int) -> bytes:
    """Pack the number of writes done."""
    return _COUNT.pack(done)


def unpack_write_multi_reply(body: bytes) -> int:
    """Unpack the number of writes done."""
    _require(body, _COUNT.size, "the reply to REGION_WRITE_MULTI")
    done: int = _COUNT.unpack_from(body)[0]
    return done


class DmaAccess(NamedTuple):
    """DMA_READ and DMA_WRITE, both ways: data as in a RegionAccess."""

    address: int
    size: int
    data: bytes = b""

    def pack(self) -> bytes:
        return _DMA.pack(self.address, self.size) + self.data

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Unpack a message without data."""
        _require(body, _DMA.size, "a DMA access")
        return cls(*_DMA.unpack_from(body))

    @classmethod
    def unpack_data(cls, body: bytes) -> Self:
        """Unpack a message with `size` bytes of data."""
        _require(body, _DMA.size, "a DMA access")
        address, size = _DMA.unpack_from(body)
        data = body[_DMA.size :]
        if len(data) != size:
            raise InvalidError(f"a DMA access of {size} bytes has {len(data)}")
        return cls(address, size, data)
