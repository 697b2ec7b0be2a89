"""VFIO as the kernel offers it: its ioctls for container, group and device.

Structures and numbers are those of include/uapi/linux/vfio.h, type 1 IOMMU, group API.
Every method is one ioctl and raises OSError; what that means is told by `vfio.py`.
"""

import fcntl
import os
import struct
from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

from vbus.pci.constants import Irq, Region

API_VERSION = 0
TYPE1V2_IOMMU = 3
_BASE = ord(";") << 8 | 100
_GET_API_VERSION = _BASE + 0
_CHECK_EXTENSION = _BASE + 1
_SET_IOMMU = _BASE + 2
_GROUP_GET_STATUS = _BASE + 3
_GROUP_SET_CONTAINER = _BASE + 4
_GROUP_GET_DEVICE_FD = _BASE + 6
_DEVICE_GET_REGION_INFO = _BASE + 8
_DEVICE_GET_IRQ_INFO = _BASE + 9
_DEVICE_SET_IRQS = _BASE + 10
_DEVICE_RESET = _BASE + 11
_IOMMU_MAP_DMA = _BASE + 13

_GROUP_STATUS = struct.Struct("=II")
_GROUP_VIABLE = 1 << 0
_DMA_MAP = struct.Struct("=IIQQQ")
_DMA_READ_WRITE = 0b11
_REGION_INFO = struct.Struct("=IIIIQQ")
_IRQ_INFO = struct.Struct("=IIII")
_IRQ_SET = struct.Struct("=IIIII")


class _IrqSet(IntFlag):
    DATA_NONE = 1 << 0
    DATA_EVENTFD = 1 << 2
    ACTION_TRIGGER = 1 << 5


class RegionPlace(NamedTuple):
    """Where a region is in the device's file, and its size in bytes."""

    offset: int
    size: int


class _File:
    """A file descriptor with an owner."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: str | os.PathLike[str]) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


class Container(_File):
    """Groups that share one IOMMU context, which ends when this is closed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(_open(path))

    def is_known(self) -> bool:
        """Does the kernel speak this API and have the type 1 IOMMU?"""
        return (
            fcntl.ioctl(self.fd, _GET_API_VERSION) == API_VERSION
            and fcntl.ioctl(self.fd, _CHECK_EXTENSION, TYPE1V2_IOMMU) == 1
        )

    def set_iommu(self) -> None:
        """Attach the container's groups to the IOMMU."""
        fcntl.ioctl(self.fd, _SET_IOMMU, TYPE1V2_IOMMU)

    def map_dma(self, address: int, iova: int, size: int) -> None:
        """Let devices reach memory of this process; the kernel pins it."""
        argument = _DMA_MAP.pack(_DMA_MAP.size, _DMA_READ_WRITE, address, iova, size)
        fcntl.ioctl(self.fd, _IOMMU_MAP_DMA, argument)


class Group(_File):
    """Functions that the IOMMU cannot tell apart; one process at a time opens it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(_open(path))

    def is_viable(self) -> bool:
        """Is no function of it held by another driver?"""
        status = bytearray(_GROUP_STATUS.pack(_GROUP_STATUS.size, 0))
        fcntl.ioctl(self.fd, _GROUP_GET_STATUS, status)
        return bool(_GROUP_STATUS.unpack(status)[1] & _GROUP_VIABLE)

    def set_container(self, container: Container) -> None:
        fcntl.ioctl(self.fd, _GROUP_SET_CONTAINER, struct.pack("=i", container.fd))

    def open_device(self, address: str) -> "DeviceFile":
        # A buffer that can be written to has ioctl return the result, here the fd.
        name = bytearray(address.encode() + b"\0")
        return DeviceFile(fcntl.ioctl(self.fd, _GROUP_GET_DEVICE_FD, name))


class DeviceFile(_File):
    """A function; its regions are parts of this file."""

    def region(self, index: Region) -> RegionPlace:
        info = bytearray(_REGION_INFO.pack(_REGION_INFO.size, 0, index, 0, 0, 0))
        fcntl.ioctl(self.fd, _DEVICE_GET_REGION_INFO, info)
        *_, size, offset = _REGION_INFO.unpack(info)
        return RegionPlace(offset, size)

    def irq_count(self, kind: Irq) -> int:
        info = bytearray(_IRQ_INFO.pack(_IRQ_INFO.size, 0, kind, 0))
        fcntl.ioctl(self.fd, _DEVICE_GET_IRQ_INFO, info)
        count: int = _IRQ_INFO.unpack(info)[3]
        return count

    def set_irqs(self, kind: Irq, eventfds: Sequence[int]) -> None:
        """Deliver interrupts to eventfds, vector by vector; without any, to nobody."""
        data = _IrqSet.DATA_EVENTFD if eventfds else _IrqSet.DATA_NONE
        flags = data | _IrqSet.ACTION_TRIGGER
        fds = struct.pack(f"={len(eventfds)}i", *eventfds)
        size = _IRQ_SET.size + len(fds)
        argument = _IRQ_SET.pack(size, flags, kind, 0, len(eventfds)) + fds
        fcntl.ioctl(self.fd, _DEVICE_SET_IRQS, argument)

    def reset(self) -> None:
        fcntl.ioctl(self.fd, _DEVICE_RESET)
