"""Ways for a guest to tell the host "look": what each takes, and where it stops.

Each gives every device an address of its own out of the space it needs, so the limit is
that of an allocation. The remarks are those of the 2013 thread.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vbus.compare.layouts.ports import NarrowWindows
from vbus.compare.platforms import Platform
from vbus.compare.registers import NET_CONFIG, legacy_bar
from vbus.compare.space import ExhaustedError, Space

_SEARCH_END = 1 << 16
ASSIGNED_REGION = 4096
ASSIGNED_BYTES = 2


@dataclass(frozen=True, slots=True)
class Doorbell:
    """One kind of doorbell.

    `cost` is the key of a cost model. `nested`: works in a guest of a guest;
    `assigned`: works for a device passed through. `room` gives the space it allocates
    from and the bytes and alignment of one doorbell, or None if it needs no address.
    """

    name: str
    title: str
    cost: str
    rows: str
    nested: bool
    assigned: bool
    remark: str
    room: Callable[[Platform], tuple[Space, int]] | None


def _port_bars(platform: Platform) -> tuple[Space, int]:
    ports = Space("I/O ports", platform.legacy_ports, 1 << 16)
    return ports, legacy_bar(NET_CONFIG)


def _narrow_windows(platform: Platform) -> tuple[Space, int]:
    ports = Space("I/O ports", platform.legacy_ports, 1 << 16)
    assert NarrowWindows.windows.io is not None
    return ports, NarrowWindows.windows.io


def _page_each(platform: Platform) -> tuple[Space, int]:
    return Space("memory below 4 GiB", *platform.memory), 4096


def _assigned(platform: Platform) -> tuple[Space, int]:
    start = platform.legacy_ports
    region = Space("assigned I/O addresses", start, start + ASSIGNED_REGION)
    return region, ASSIGNED_BYTES


DOORBELLS = (
    Doorbell(
        "pio-exit",
        "port write, exit",
        "pio_exit",
        "R30",
        True,
        True,
        "cheap, but ports are scarce: each BAR takes some of 64 KiB",
        _port_bars,
    ),
    Doorbell(
        "mmio-exit",
        "MMIO write, exit",
        "mmio_exit",
        "R30",
        True,
        True,
        "room for all, but the access must be decoded by software",
        _page_each,
    ),
    Doorbell(
        "hypercall",
        "hypercall with address and data",
        "hypercall",
        "R30 R32",
        False,
        False,
        "faster than a port; useless for nested or assigned devices; the kernel"
        " must support it for ever",
        None,
    ),
    Doorbell(
        "pv-mmio",
        "paravirtual MMIO by one agreed instruction",
        "pv_mmio",
        "R30 R32",
        True,
        True,
        "helps nested and assigned devices; a little slower than a port",
        _page_each,
    ),
    Doorbell(
        "assigned-address",
        "I/O address assigned by the hypervisor",
        "pio_exit",
        "R32",
        False,
        True,
        "2 bytes a device, no kernel support needed; breaks nested guests",
        _assigned,
    ),
    Doorbell(
        "narrow-window",
        "port write behind a narrow bridge window",
        "pio_exit",
        "R32",
        True,
        True,
        "smaller windows, still fragmenting",
        _narrow_windows,
    ),
    Doorbell(
        "pio-ioeventfd",
        "port write, ioeventfd",
        "pio_ioeventfd",
        "R30",
        True,
        False,
        "answered in the kernel; an eventfd a doorbell",
        _port_bars,
    ),
    Doorbell(
        "mmio-ioeventfd",
        "MMIO write, ioeventfd",
        "mmio_ioeventfd",
        "R30",
        True,
        False,
        "answered in the kernel, decoded first unless it matches any length",
        _page_each,
    ),
)


def allocate(doorbell: Doorbell, devices: int, platform: Platform) -> Space | None:
    """Give every device its address. Raises ExhaustedError; None: needs none."""
    if doorbell.room is None:
        return None
    space, size = doorbell.room(platform)
    for number in range(devices):
        space.take(size, size, f"doorbell {number}")
    return space


def limit(doorbell: Doorbell, platform: Platform) -> tuple[int, ExhaustedError | None]:
    """Take addresses until there are none: how many there were, and the refusal."""
    if doorbell.room is None:
        return _SEARCH_END, None
    space, size = doorbell.room(platform)
    for number in range(_SEARCH_END):
        try:
            space.take(size, size, f"doorbell {number}")
        except ExhaustedError as error:
            return number, error
    return _SEARCH_END, None
