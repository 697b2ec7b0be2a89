"""Open a PCI function of this machine by what the machine has for it."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from proxy.linux import uio, vfio
from proxy.linux.devices import SYSFS, PciDevice, find
from proxy.pci import PciFunction
from vbus import abi
from vbus.errors import InvalidError, NotFoundError, VbusError

_ADDRESS = re.compile(r"([0-9a-f]{4}:)?[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", re.I)


def is_address(text: str) -> bool:
    """Does this look like the address of a PCI function, as 0000:00:04.0?"""
    return _ADDRESS.fullmatch(text) is not None


def bridges(root: Path = SYSFS) -> list[PciDevice]:
    """Give the bridges of this machine, by address."""
    return find(abi.VENDOR_ID, abi.DEVICE_ID, root)


def choose(address: str | None = None, root: Path = SYSFS) -> PciDevice:
    """Give the bridge at an address, or the only one.

    Raises NotFoundError if there is none, InvalidError if there are several.
    """
    found = {device.address: device for device in bridges(root)}
    ids = f"{abi.VENDOR_ID:04x}:{abi.DEVICE_ID:04x}"
    if address is not None:
        full = address.lower() if address.count(":") == 2 else f"0000:{address.lower()}"
        if full not in found:
            raise NotFoundError(f"there is no bridge ({ids}) at {full}")
        return found[full]
    if not found:
        raise NotFoundError(
            f"this machine has no bridge ({ids}); a process of the host names the"
            " socket of its guest: vbus guest run SOCKET"
        )
    if len(found) > 1:
        names = " or ".join(found)
        raise InvalidError(f"this machine has several bridges: take --device {names}")
    return next(iter(found.values()))


@asynccontextmanager
async def open_function(
    device: PciDevice, memory_size: int, say: Callable[[str], object] = lambda _: None
) -> AsyncIterator[PciFunction]:
    """Hold a function for the time of the body; `say` is told by what way, and why.

    Raises BusyError if somebody else has it, and other VbusErrors whose message says
    what is missing and the command that helps.
    """
    reason = _without_vfio(device)
    if reason is None:
        say(f"{device.address}: by vfio (IOMMU group {device.iommu_group})")
        async with vfio.opened(device, memory_size) as function:
            yield function
    else:
        say(f"{device.address}: by uio ({reason}), without interrupts: polled")
        async with uio.opened(device, memory_size) as polled:
            yield polled


def _without_vfio(device: PciDevice) -> str | None:
    """Tell why to do without vfio; physical addresses must mean something then."""
    vfio.settle(device)
    if device.iommu_group is None:
        return "no IOMMU"
    if device.iommu_type == "identity":
        try:
            vfio.load()
        except VbusError as error:
            return f"the IOMMU passes addresses through, and {error}"
    return None
