"""The numbers that every virtio device shares (virtio 1.2)."""

from enum import IntEnum, IntFlag
from typing import Final


class DeviceId(IntEnum):
    """Section 5: what kind of device."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    SCSI = 8
    NINEP = 9


class Status(IntFlag):
    """Section 2.1: the device status field."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Ring(IntEnum):
    """Feature bits of rings and transport (section 6), as bit numbers."""

    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    NOTIFICATION_DATA = 38
    RESET = 40


QUEUE_SIZE_LIMIT: Final = 32768


def bits(*numbers: int) -> int:
    """Give the feature word with these bits set."""
    return sum(1 << number for number in set(numbers))
