"""The function by VFIO on a file like a device's, and what is said when it fails.

With the kernel's VFIO: tests/vm/test_vfio.py.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.linux import vfio
from proxy.linux.local import claimed
from proxy.linux.vfio import VfioFunction
from proxy.linux.vfio_ioctl import DeviceFile, RegionPlace
from proxy.memory import DmaMemory
from tests.proxy.host import open_fds
from tests.proxy.linux.sysfs import add_function, bridge, link
from vbus.errors import (
    BusyError,
    InvalidError,
    NoDeviceError,
    NotFoundError,
    PermissionDeniedError,
)
from vbus.pci.constants import Irq, Region

PLACES = {
    Region.BAR0: RegionPlace(0x1000, 64),
    Region.BAR1: RegionPlace(0x2000, 32),
    Region.CONFIG: RegionPlace(0x7000, 256),
}


class File(DeviceFile):
    """Reads and writes are those of a file; what ioctls would be told is kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT))
        os.ftruncate(self.fd, 0x8000)
        self.irqs: dict[Irq, Sequence[int]] = {}
        self.resets = 0

    def region(self, index: Region) -> RegionPlace:
        return PLACES.get(index, RegionPlace(0, 0))

    def irq_count(self, kind: Irq) -> int:
        return {Irq.MSI: 1, Irq.MSIX: 8}[kind]

    def set_irqs(self, kind: Irq, eventfds: Sequence[int]) -> None:
        if kind == Irq.MSI:
            raise OSError(16, "Device or resource busy")
        self.irqs[kind] = list(eventfds)

    def reset(self) -> None:
        self.resets += 1
        if self.resets > 1:
            raise OSError(25, "Inappropriate ioctl for device")


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "device")


@pytest.fixture
def function(tmp_path: Path, file: File) -> Iterator[VfioFunction]:
    add_function(tmp_path)
    before = open_fds()
    with DmaMemory(1 << 20) as memory:
        function = VfioFunction(bridge(tmp_path), file, memory)
        yield function
        function.close()
        function.close()
    assert open_fds() == before - 1


async def test_each_region_is_accessed_at_its_place(
    function: VfioFunction, file: File
) -> None:
    """R5: one access of the driver is one of the file."""
    await function.config_write(4, b"\6\0")
    await function.bar_write(0, 60, b"abcd")
    function.post_write(1, 8, b"wxyz")
    function.ring_doorbell(1, 28, 0x04030201)
    assert os.pread(file.fd, 2, 0x7004) == b"\6\0"
    assert os.pread(file.fd, 5, 0x103C) == b"abcd\0"
    assert os.pread(file.fd, 4, 0x2008) == b"wxyz"
    assert os.pread(file.fd, 5, 0x201C) == b"\1\2\3\4\0"
    assert await function.bar_read(1, 8, 4) == b"wxyz"
    assert await function.config_read(5, 1) == b"\0"
    statistics = function.statistics()
    assert (statistics.config_reads, statistics.config_writes) == (1, 1)
    assert (statistics.bar_reads, statistics.bar_writes) == (1, 3)


@pytest.mark.parametrize(("bar", "offset"), [(0, 61), (0, -1), (1, 32), (2, 0)])
async def test_no_access_leaves_its_region(
    function: VfioFunction, bar: int, offset: int
) -> None:
    with pytest.raises(InvalidError, match=r"0000:00:04.0: no 4 bytes at"):
        await function.bar_read(bar, offset, 4)
    with pytest.raises(InvalidError):
        function.post_write(bar, offset, bytes(4))
    with pytest.raises(InvalidError):
        await function.config_read(256, 1)


async def test_vectors_are_eventfds_until_closed(
    function: VfioFunction, file: File
) -> None:
    """R5: and the kernel is told to stop before the eventfds are."""
    assert function.interrupt_vectors(Irq.MSIX) == 8
    assert function.interrupt_vectors(Irq.INTX) == 0
    interrupts = await function.enable_interrupts(Irq.MSIX, 3)
    assert len(file.irqs[Irq.MSIX]) == 3
    os.eventfd_write(file.irqs[Irq.MSIX][2], 1)
    with trio.fail_after(5):
        assert await interrupts.wait() == [2]
    function.close()
    assert file.irqs[Irq.MSIX] == []
    with pytest.raises(NoDeviceError, match="is closed"):
        await interrupts.wait()
    with pytest.raises(NoDeviceError, match="is closed"):
        await function.enable_interrupts(Irq.MSIX, 3)


async def test_interrupts_that_cannot_be_are_refused(function: VfioFunction) -> None:
    for kind, vectors in ((Irq.MSIX, 9), (Irq.MSIX, 0), (Irq.MSI, 2), (Irq.INTX, 1)):
        with pytest.raises(InvalidError, match="has no"):
            await function.enable_interrupts(kind, vectors)
    before = open_fds()
    with pytest.raises(InvalidError, match="Device or resource busy"):
        await function.enable_interrupts(Irq.MSI, 1)
    assert open_fds() == before


async def test_a_function_that_the_kernel_wants_back_is_gone(
    function: VfioFunction, file: File
) -> None:
    """R61: interrupts that are waited for end with it."""
    interrupts = await function.enable_interrupts(Irq.MSIX, 8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.run)
        os.eventfd_write(file.irqs[Irq.REQ][0], 1)
        with trio.fail_after(5), pytest.raises(NoDeviceError, match="takes 0000"):
            await interrupts.wait()
    with pytest.raises(NoDeviceError, match=r"takes .* away"):
        await function.bar_read(0, 0, 4)


async def test_a_function_that_reads_as_all_ones_is_gone(
    function: VfioFunction, file: File, autojump_clock: trio.testing.MockClock
) -> None:
    """R61: the host died, and the machine lives on; vfio goes on giving the ids."""
    os.pwrite(file.fd, b"\xff" * 64, 0x1000)
    os.pwrite(file.fd, b"\xff" * 3, 0x7008)
    # A register may hold that: the function is still there.
    assert await function.bar_read(0, 0, 4) == b"\xff" * 4
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.run)
        await trio.sleep(5)
        assert function.error is None
        os.pwrite(file.fd, b"\xff" * 248, 0x7008)
    with pytest.raises(NoDeviceError, match="does not answer any more"):
        await function.bar_read(0, 0, 4)


async def test_a_reset_that_the_kernel_cannot_do_is_refused(
    function: VfioFunction, file: File
) -> None:
    await function.reset()
    assert file.resets == 1
    with pytest.raises(InvalidError, match=r"cannot be reset: Inappropriate ioctl"):
        await function.reset()


# Opening


def test_a_function_has_one_user(tmp_path: Path) -> None:
    add_function(tmp_path)
    device = bridge(tmp_path)
    with (
        claimed(device),
        pytest.raises(BusyError, match="in use by another process"),
        claimed(device),
    ):
        pass
    with claimed(device):
        pass


def test_what_blocks_inside_of_a_claim_is_not_taken_for_a_claim(tmp_path: Path) -> None:
    add_function(tmp_path)
    with pytest.raises(BlockingIOError), claimed(bridge(tmp_path)):
        raise BlockingIOError


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "dev/vfio"
    path.mkdir(parents=True)
    monkeypatch.setattr(vfio, "DEV", path)
    return path


@pytest.mark.usefixtures("dev")
def test_without_vfio_the_command_is_told() -> None:
    with pytest.raises(NotFoundError, match=r"no .*vfio/vfio; run: modprobe vfio-pci"):
        vfio._open_container()


def test_without_a_group_the_iommu_is_asked_for(tmp_path: Path) -> None:
    add_function(tmp_path)
    with pytest.raises(NotFoundError, match="in no IOMMU group: give the machine an"):
        vfio._open_group(bridge(tmp_path))


def test_without_rights_the_command_is_told(dev: Path) -> None:
    told = vfio._not_opened(dev / "12", PermissionError(13, "Permission denied"))
    assert isinstance(told, PermissionDeniedError)
    assert f"chown {os.geteuid()} {dev / '12'}" in str(told)


def test_neighbours_with_drivers_are_named(tmp_path: Path) -> None:
    """Functions without a driver, and bridges, do not stand in the way."""
    path = add_function(tmp_path)
    link(path, "iommu_group", "groups/3")
    (path / "iommu_group/devices").mkdir()
    drivers = {"05.0": "e1000", "06.0": None, "07.0": "pcieport", "08.0": "ahci"}
    for name, driver in drivers.items():
        other = add_function(tmp_path, f"0000:00:{name}", vendor=0x8086)
        if driver is not None:
            link(other, "driver", f"drivers/{driver}")
        (path / "iommu_group/devices" / other.name).symlink_to(other)
    told = vfio._who_hinders(bridge(tmp_path))
    assert told.startswith(
        "0000:00:04.0 (IOMMU group 3) has 0000:00:05.0 (e1000) and 0000:00:08.0 (ahci)"
        " as well; run: echo 0000:00:05.0 >/sys/bus/pci/drivers/e1000/unbind && "
    )
