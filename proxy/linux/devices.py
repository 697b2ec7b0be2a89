"""PCI functions as sysfs shows them: found by id, described, bound to a driver.

Reads and writes sysfs only. `root` is where that is, so that tests can have their own.
"""

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import (
    BusyError,
    NoDeviceError,
    NotFoundError,
    PermissionDeniedError,
)
from vbus.pci.constants import BAR_COUNT

SYSFS = Path("/sys")
_IO = 0x100
_MEMORY = 0x200


@dataclass(frozen=True)
class Resource:
    """Where a BAR is, and its size in bytes."""

    start: int
    size: int
    io: bool


@dataclass(frozen=True)
class PciDevice:
    """One function: its address, as 0000:00:04.0, and its folder in sysfs."""

    address: str
    path: Path

    @property
    def driver(self) -> str | None:
        """The driver that it is bound to now."""
        return self._link("driver")

    @property
    def iommu_group(self) -> str | None:
        """The number of its IOMMU group; None: no IOMMU stands before it."""
        return self._link("iommu_group")

    @property
    def iommu_type(self) -> str:
        """What its IOMMU does: "identity", or a kind of translation."""
        return self._read("iommu_group/type").strip()

    @property
    def machine_has_iommu(self) -> bool:
        """Is there an IOMMU at all, be it before other functions?"""
        return any((self.path.parents[3] / "class/iommu").glob("*"))

    def _link(self, name: str) -> str | None:
        try:
            return os.path.basename(os.readlink(self.path / name))
        except FileNotFoundError:
            return None

    def bars(self) -> dict[int, Resource]:
        """Give the BARs it has. Raises NoDeviceError."""
        found = {}
        for index, line in enumerate(self._read("resource").splitlines()[:BAR_COUNT]):
            start, end, flags = (int(word, 16) for word in line.split())
            if flags & (_IO | _MEMORY):
                found[index] = Resource(start, end - start + 1, bool(flags & _IO))
        return found

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError as error:
            raise NoDeviceError(f"{self.address}: {error.strerror}") from None

    def bind(self, driver: str, module: str, load: Callable[[str], None]) -> None:
        """Have `driver` bound to it, and its module loaded if it is not there.

        Raises BusyError if another driver has it, PermissionDeniedError, and
        NotFoundError with the command that would help.
        """
        has = self.driver
        if has == driver:
            return
        if has is not None:
            raise BusyError(
                f"{self.address} is bound to {has}; run: echo {self.address} >"
                f" {self.path}/driver/unbind"
            )
        try:
            (self.path / "driver_override").write_text(driver)
            if not (self.path.parent.parent / "drivers" / driver).exists():
                load(module)
            probe = self.path.parent.parent / "drivers_probe"
            probe.write_text(self.address)
        except PermissionError:
            raise PermissionDeniedError(
                f"{self.address} can be bound to {driver} by root only: run this as"
                " root"
            ) from None
        except OSError as error:
            raise NoDeviceError(
                f"{self.address} cannot be bound to {driver}: {error.strerror}"
            ) from None
        if self.driver != driver:
            raise NotFoundError(
                f"{driver} does not take {self.address}: dmesg tells why"
            )

    def release(self) -> None:
        """Have it bound to no driver and kept for none, as `bind` found it.

        What is gone meanwhile needs no release.
        """
        with suppress(OSError):
            (self.path / "driver_override").write_text("\n")
        with suppress(OSError):
            (self.path / "driver/unbind").write_text(self.address)


def find(vendor: int, device: int, root: Path = SYSFS) -> list[PciDevice]:
    """Give all functions of one kind, by address."""
    found = []
    for path in sorted((root / "bus/pci/devices").glob("*")):
        try:
            ids = [int((path / name).read_text(), 16) for name in ("vendor", "device")]
        except OSError:  # gone meanwhile
            continue
        if ids == [vendor, device]:
            found.append(PciDevice(path.name, root / "bus/pci/devices" / path.name))
    return found


def load_module(name: str) -> None:
    """Load a module of the kernel. Raises NotFoundError, PermissionDeniedError."""
    if os.geteuid() != 0:
        raise PermissionDeniedError(
            f"the module {name} is not loaded; run as root: modprobe {name}"
        )
    try:
        done = subprocess.run(
            ["modprobe", name], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise NotFoundError(
            f"the module {name} is not loaded, and there is no modprobe to load it"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise NotFoundError(f"modprobe {name} failed: {said[-1]}")
