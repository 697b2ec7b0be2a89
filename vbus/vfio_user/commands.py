"""The commands of a vfio-user server that are answered at once.

Each takes the request's payload and its descriptors and returns the reply's payload,
with the descriptors that go along. A VbusError refuses the request. Region accesses,
which may take their time, are not here.
"""

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vbus.errors import InvalidError, NoSpaceError, VbusError
from vbus.pci.constants import IRQ_COUNT, REGION_COUNT
from vbus.pci.function import IoEventFd, PciFunction
from vbus.vfio_user import wire
from vbus.vfio_user.interrupts import InterruptTable
from vbus.vfio_user.statistics import Counters
from vbus.vfio_user.wire import Command


class UnsupportedError(VbusError):
    """Something of the protocol that this server does not offer (ENOTSUP)."""

    errno = errno.ENOTSUP


class Answer(NamedTuple):
    """A reply's payload and the descriptors to send along; they stay their owner's."""

    body: bytes = b""
    fds: Sequence[int] = ()


Handler = Callable[[bytes, list[int]], Answer]


class DeviceCommands:
    """Memory, interrupts, reset and descriptions of one function for one client.

    A handler takes descriptors it keeps out of the list; the caller closes the rest.
    """

    def __init__(
        self, function: PciFunction, counters: Counters, *, allow_truncatable: bool
    ) -> None:
        self.interrupts = InterruptTable(function.irq_count, function.line_asserted)
        self.client_max_fds = 1
        self._function = function
        self._counters = counters
        self._allow_truncatable = allow_truncatable
        self._maps = 0

    def count_maps(self) -> None:
        """Take note of memory that was not mapped by this client's requests."""
        self._maps = len(self._function.memory.regions())

    def handlers(self) -> dict[int, Handler]:
        return {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
        }

    def _dma_map(self, body: bytes, fds: list[int]) -> Answer:
        """Map a range; without a descriptor only DMA messages reach it."""
        request = wire.DmaMap.unpack(body)
        if len(fds) > 1:
            raise InvalidError(f"DMA_MAP with {len(fds)} descriptors")
        if not request.flags & wire.DmaFlag.READ:
            raise InvalidError(f"DMA_MAP with flags {request.flags:#x}: not readable")
        if self._maps >= wire.MAX_DMA_MAPS:
            raise NoSpaceError(f"{self._maps} ranges are mapped")
        self._function.memory.map(
            request.address,
            request.size,
            fds[0] if fds else None,
            request.offset if fds else 0,
            writable=bool(request.flags & wire.DmaFlag.WRITE),
            allow_truncatable=self._allow_truncatable,
        )
        self._maps += 1
        self._counters.dma_maps += 1
        if not fds:
            self._counters.unbacked_maps += 1
        return Answer()

    def _dma_unmap(self, body: bytes, _fds: list[int]) -> Answer:
        """Unmap what lies in a range, be it nothing: QEMU unmaps whole power-of-two
        ranges, whatever is in them."""
        request = wire.DmaUnmap.unpack(body)
        if request.flags & ~wire.UnmapFlag.ALL:
            raise UnsupportedError(f"DMA_UNMAP with flags {request.flags:#x}")
        memory = self._function.memory
        if request.flags & wire.UnmapFlag.ALL:
            memory.clear()
            self._maps = 0
        elif request.size:
            self._maps -= memory.unmap(request.address, request.size)
        self._counters.dma_unmaps += 1
        return Answer(request.pack())

    def _device_info(self, body: bytes, _fds: list[int]) -> Answer:
        _check_room(wire.DeviceInfo.unpack(body).argsz, wire.INFO_SIZE)
        flags = wire.DeviceFlag.RESET | wire.DeviceFlag.PCI
        return Answer(wire.DeviceInfo(flags, REGION_COUNT, IRQ_COUNT).pack())

    def _region_info(self, body: bytes, _fds: list[int]) -> Answer:
        request = wire.RegionInfo.unpack(body)
        _check_room(request.argsz, wire.REGION_INFO_SIZE)
        region = self._function.region(_check_region(request.region))
        flags = 0
        if region.size:
            flags |= wire.RegionFlag.READ if region.readable else 0
            flags |= wire.RegionFlag.WRITE if region.writable else 0
            flags |= wire.RegionFlag.MMAP if region.fd is not None else 0
        reply = wire.RegionInfo(
            request.region, flags, region.size, areas=region.mappable
        )
        fits = request.argsz >= reply.full_size
        fds = [region.fd] if region.fd is not None and fits else []
        return Answer(reply.pack_reply(request.argsz), fds)

    def _region_io_fds(self, body: bytes, _fds: list[int]) -> Answer:
        """Offer eventfds for writes: as many as the client can receive in a message."""
        request = wire.RegionIoFds.unpack(body)
        _check_room(request.argsz, wire.INFO_SIZE)
        index = _check_region(request.region)
        limit = min(self.client_max_fds, wire.SCM_MAX_FD)
        offers = self._function.io_eventfds(index, limit)
        size = wire.INFO_SIZE + wire.IO_FD_SIZE * len(offers)
        if size > request.argsz:
            return Answer(wire.RegionIoFds(index, total=len(offers), argsz=size).pack())
        fds = list(dict.fromkeys(offer.fd for offer in offers))
        pio = wire.IoEventFdFlag.PIO if self._function.region(index).io else 0
        subregions = [_sub_region(offer, fds, pio) for offer in offers]
        return Answer(wire.RegionIoFds.pack_reply(index, subregions), fds)

    def _irq_info(self, body: bytes, _fds: list[int]) -> Answer:
        request = wire.IrqInfo.unpack(body)
        _check_room(request.argsz, wire.INFO_SIZE)
        if request.irq >= IRQ_COUNT:
            raise InvalidError(f"there is no IRQ index {request.irq}")
        vectors = self._function.irq_count(request.irq)
        flags = wire.IrqInfoFlag.EVENTFD | wire.IrqInfoFlag.MASKABLE if vectors else 0
        return Answer(wire.IrqInfo(request.irq, flags, vectors).pack())

    def _set_irqs(self, body: bytes, fds: list[int]) -> Answer:
        self.interrupts.set(wire.SetIrqs.unpack(body), fds)
        self._counters.irq_settings += 1
        return Answer()

    def _reset(self, _body: bytes, _fds: list[int]) -> Answer:
        self._function.reset()
        self.interrupts.forget_pending()
        self._counters.resets += 1
        return Answer()


def _check_room(argsz: int, least: int) -> None:
    if argsz < least:
        raise InvalidError(f"the reply takes {least} bytes, there is room for {argsz}")


def _check_region(index: int) -> int:
    if index >= REGION_COUNT:
        raise InvalidError(f"there is no region {index}")
    return index


def _sub_region(offer: IoEventFd, fds: list[int], flags: int) -> wire.SubRegion:
    if offer.datamatch is not None:
        flags |= wire.IoEventFdFlag.DATAMATCH
    return wire.SubRegion(
        offer.offset,
        offer.size,
        fds.index(offer.fd),
        wire.IoFdType.IOEVENTFD,
        flags,
        offer.datamatch or 0,
    )
