"""A PCI function by VFIO: what the kernel gives a process behind an IOMMU.

    BARs, configuration space   parts of one file; each access is one access (pread)
    interrupts                  MSI and MSI-X as eventfds
    DMA memory                  huge pages, mapped once at addresses of our choice

The function reaches that memory and no other. When the files close, however this
process ends, the kernel ends interrupts and bus mastering first, then unmaps.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import trio

from proxy.linux.devices import PciDevice, load_module
from proxy.linux.local import LocalFunction, claimed
from proxy.linux.physical import reserve
from proxy.linux.vfio_ioctl import Container, DeviceFile, Group, RegionPlace
from proxy.memory import HUGE_PAGE_SIZE, DmaMemory
from proxy.pci import Interrupts
from proxy.tasks import beside
from shm import Doorbell
from vbus.errors import (
    BusyError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    NotFoundError,
    PermissionDeniedError,
    VbusError,
)
from vbus.pci.constants import BAR_COUNT, Irq, Region

DRIVER = "vfio-pci"
IOMMU_MODULE = "vfio_iommu_type1"
DEV = Path("/dev/vfio")
MODULES = Path("/sys/module")
IOVA = 1 << 32
"""Where the memory is to the function: above every hole of the first 4 GiB."""
_NO_HINDRANCE = {None, DRIVER, "pci-stub", "pcieport"}


class VfioFunction(LocalFunction):
    """The function that `file` is of, which reaches `memory`. Close it after use."""

    def __init__(self, device: PciDevice, file: DeviceFile, memory: DmaMemory) -> None:
        """Learn its shape. Raises OSError."""
        super().__init__(device)
        self.memory = memory
        self._file = file
        self._config = file.region(Region.CONFIG)
        self._bars = [file.region(Region(bar)) for bar in range(BAR_COUNT)]
        self._vectors = {kind: file.irq_count(kind) for kind in (Irq.MSI, Irq.MSIX)}
        self._enabled: list[Irq] = []
        self._wanted_back = Doorbell()
        try:
            file.set_irqs(Irq.REQ, [self._wanted_back.fileno()])
        except BaseException:
            self._wanted_back.close()
            raise

    # Life

    async def run(self) -> None:
        """Watch until the function is gone, or until the kernel wants it back.

        It does when the function is unplugged or given another driver, and whoever
        does that waits until we let go.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear_kernel)
            await super().run()
            nursery.cancel_scope.cancel()

    async def _hear_kernel(self) -> None:
        await trio.lowlevel.wait_readable(self._wanted_back.fileno())
        self.lose(NoDeviceError(f"the kernel takes {self.device.address} away"))

    def close(self) -> None:
        """End interrupts and bus mastering. Idempotent."""
        self.lose(NoDeviceError(f"{self.device.address} is closed"))
        for kind in self._enabled:
            with suppress(OSError):  # the file's end does the same
                self._file.set_irqs(kind, [])
        self._enabled.clear()
        if self._interrupts is not None:
            self._interrupts.close()
        self._file.close()
        self._wanted_back.close()

    # PciFunction

    def _config_get(self, offset: int, size: int) -> bytes:
        return self._read(self._file.fd, self._at(self._config, offset, size), size)

    def _config_put(self, offset: int, data: bytes) -> None:
        at = self._at(self._config, offset, len(data))
        self._write(self._file.fd, at, data)

    def _bar_get(self, bar: int, offset: int, size: int) -> bytes:
        return self._read(self._file.fd, self._at(self._bars[bar], offset, size), size)

    def _bar_put(self, bar: int, offset: int, data: bytes) -> None:
        at = self._at(self._bars[bar], offset, len(data))
        self._write(self._file.fd, at, data)

    def _at(self, region: RegionPlace, offset: int, size: int) -> int:
        """Give the place in the file; beyond a region's end is another region."""
        if not 0 <= offset <= region.size - size:
            raise InvalidError(
                f"{self.device.address}: no {size} bytes at {offset:#x} of a region of"
                f" {region.size}"
            )
        return region.offset + offset

    def interrupt_vectors(self, kind: Irq) -> int:
        return self._vectors.get(kind, 0)

    async def enable_interrupts(self, kind: Irq, vectors: int) -> Interrupts:
        await self._turn()
        self._check_open()
        if not 0 < vectors <= self.interrupt_vectors(kind):
            raise InvalidError(f"the function has no {vectors} {kind.name} vectors")
        interrupts = Interrupts(vectors)
        try:
            # The kernel sets up the capability and the vectors themselves.
            bells = [bell.fileno() for bell in interrupts.doorbells]
            self._file.set_irqs(kind, bells)
        except OSError as error:
            interrupts.close()
            raise self._refused(error) from None
        self._enabled.append(kind)
        self._interrupts = interrupts
        return interrupts

    async def reset(self) -> None:
        await self._turn()
        self._check_open()
        try:
            self._file.reset()
        except OSError as error:
            raise InvalidError(
                f"{self.device.address} cannot be reset: {error.strerror}"
            ) from None


# Opening: each step tells what is missing, and the command that helps


@asynccontextmanager
async def opened(device: PciDevice, memory_size: int) -> AsyncIterator[VfioFunction]:
    """Bind a function and hold it, with at least `memory_size` bytes of huge pages.

    Afterwards it has the driver that it had before: none, or vfio-pci.
    Raises BusyError, NotFoundError, NoSpaceError, PermissionDeniedError, NoDeviceError
    with the command that helps.
    """
    with ExitStack() as stack:
        stack.enter_context(claimed(device))
        load()
        stack.enter_context(_bound(device))
        pages = max(1, -(-memory_size // HUGE_PAGE_SIZE))
        reserve(pages)
        size = pages * HUGE_PAGE_SIZE
        memory = stack.enter_context(DmaMemory(size, base=IOVA, huge=True))
        file = stack.enter_context(closing(_open_file(device, memory, stack)))
        function = stack.enter_context(closing(_make(device, file, memory)))
        async with beside(function.run):
            yield function


def settle(device: PciDevice) -> None:
    """Have an IOMMU take the function, which some do when a driver comes, not before.

    Raises BusyError, NotFoundError, PermissionDeniedError.
    """
    waits = device.iommu_group is None and device.driver is None
    if waits and device.machine_has_iommu:
        with claimed(device):
            load()
            # Without a group vfio-pci does not take it either: then there is none.
            with suppress(NotFoundError), _bound(device):
                pass


def load() -> None:
    """Have vfio's modules loaded. Raises NotFoundError, PermissionDeniedError."""
    for name in (IOMMU_MODULE, DRIVER):
        if not (MODULES / name.replace("-", "_")).exists():
            load_module(name)


@contextmanager
def _bound(device: PciDevice) -> Iterator[None]:
    was = device.driver
    try:
        device.bind(DRIVER, DRIVER, load_module)
        yield
    finally:
        if was is None:
            device.release()


def _open_file(device: PciDevice, memory: DmaMemory, stack: ExitStack) -> DeviceFile:
    """Put its group into a container of its own, map the memory, open the function."""
    container = stack.enter_context(closing(_open_container()))
    group = stack.enter_context(closing(_open_group(device)))
    try:
        if not group.is_viable():
            raise BusyError(_who_hinders(device))
        group.set_container(container)
    except OSError as error:
        raise BusyError(f"{_name(device)}: {error.strerror}") from None
    _attach_iommu(device, container)
    _map(container, memory)
    try:
        return group.open_device(device.address)
    except OSError as error:
        raise NoDeviceError(f"{device.address}: {error.strerror}") from None


def _make(device: PciDevice, file: DeviceFile, memory: DmaMemory) -> VfioFunction:
    try:
        return VfioFunction(device, file, memory)
    except OSError as error:
        raise NoDeviceError(f"{device.address}: {error.strerror}") from None


def _open_container() -> Container:
    path = DEV / "vfio"
    try:
        container = Container(path)
    except OSError as error:
        raise _not_opened(path, error) from None
    try:
        if not container.is_known():
            raise NotFoundError(
                f"vfio has no type 1 IOMMU here; run: modprobe {IOMMU_MODULE}"
            )
    except BaseException:
        container.close()
        raise
    return container


def _open_group(device: PciDevice) -> Group:
    number = device.iommu_group
    if number is None:
        raise NotFoundError(
            f"{device.address} is in no IOMMU group: give the machine an IOMMU, and"
            " the kernel intel_iommu=on or run: modprobe virtio-iommu"
        )
    try:
        return Group(DEV / number)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{_name(device)} is in use by another process") from None
        raise _not_opened(DEV / number, error) from None


def _not_opened(path: Path, error: OSError) -> VbusError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError(
            f"{path} may not be opened: run this as root, or as root: chown"
            f" {os.geteuid()} {path}"
        )
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return NotFoundError(f"there is no {path}; run: modprobe {DRIVER}")
    return NoDeviceError(f"{path}: {error.strerror}")


def _who_hinders(device: PciDevice) -> str:
    """Tell which functions of the group have drivers of the kernel."""
    others = [
        PciDevice(path.name, path)
        for path in sorted((device.path / "iommu_group/devices").glob("*"))
    ]
    held = [other for other in others if other.driver not in _NO_HINDRANCE]
    if not held:
        return f"{_name(device)} is in use"
    names = " and ".join(f"{other.address} ({other.driver})" for other in held)
    commands = " && ".join(
        f"echo {other.address} >/sys/bus/pci/drivers/{other.driver}/unbind"
        for other in held
    )
    return f"{_name(device)} has {names} as well; run: {commands}"


def _attach_iommu(device: PciDevice, container: Container) -> None:
    try:
        container.set_iommu()
    except PermissionError:
        raise PermissionDeniedError(
            f"the IOMMU before {device.address} does not remap interrupts, so that the"
            " function could raise any; if you trust the host, run: echo Y"
            f" >{MODULES}/{IOMMU_MODULE}/parameters/allow_unsafe_interrupts"
        ) from None
    except OSError as error:
        raise NoDeviceError(
            f"{_name(device)}: the IOMMU: {error.strerror}; dmesg tells more"
        ) from None


def _map(container: Container, memory: DmaMemory) -> None:
    """Have all of the memory pinned and mapped; one mapping, of huge pages."""
    with mmap.mmap(memory.fd, memory.size) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first  # or the mapping could not be closed; the pages stay pinned
        try:
            container.map_dma(address, memory.base, memory.size)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise NoSpaceError(
                    f"this user may not pin {memory.size >> 20} MiB of memory; run:"
                    f" ulimit -l {memory.size >> 10}"
                ) from None
            raise InvalidError(
                f"the IOMMU does not map {memory.size} bytes at {memory.base:#x}:"
                f" {error.strerror}"
            ) from None


def _name(device: PciDevice) -> str:
    return f"{device.address} (IOMMU group {device.iommu_group})"
