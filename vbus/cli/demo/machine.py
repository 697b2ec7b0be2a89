"""The demo's guests that are virtual machines, and the stage that has them.

Every QEMU belongs to the stage's nursery and is killed when that is left.
"""

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import trio

from vbus.cli.demo.stage import DemoError, Guest, Output, Stage
from vbus.vm import accelerator, image, qemu
from vbus.vm.arguments import Iommu
from vbus.vm.base import SITE
from vbus.vm.cache import Say
from vbus.vm.channel import GuestProcess
from vbus.vm.debian import UnavailableError
from vbus.vm.errors import GuestGoneError
from vbus.vm.machine import VirtualMachine, boot

# Started as a file: what importing the package costs is time in an emulated machine.
_TRAFFIC = ("python3", "-I", "-S", f"/{SITE}/vbus/cli/demo/traffic.py")


def prepare(say: Say) -> None:
    """Fetch and make what is not there yet, which needs the network of the host.

    Raises UnavailableError, InvalidError, OSError.
    """
    try:
        found = qemu.fetch(say)
        made = image.cached(say)
    except UnavailableError as error:
        hint = "QEMU and the guest are fetched once: run this where there is a network"
        raise UnavailableError(f"demo --vm: {error}; {hint}") from error
    accelerator.choose(found, made)


class MachineGuest(Guest):
    """`vbus guest run` in a virtual machine; traffic runs beside it."""

    ready_s = 60

    def __init__(self, name: str, vm: VirtualMachine, process: GuestProcess) -> None:
        super().__init__(name)
        self._vm = vm
        self._process = process
        self._killed = False

    @property
    def boot_seconds(self) -> float:
        """From the start of QEMU to the first program that runs in it."""
        return self._vm.boot_seconds

    async def kill(self) -> None:
        """SIGKILL the whole QEMU."""
        self._killed = True
        await self._vm.kill()

    async def _signal(self, number: int) -> None:
        self._process.signal(number)

    async def lines(self) -> AsyncIterator[str]:
        """What `vbus guest run` prints, until it is killed.

        Raises GuestGoneError (the machine ended by itself), DemoError (the program).
        """
        try:
            async for line in self._process:
                yield line
            status = await self._process.wait()
        except GuestGoneError:
            if self._killed:
                return
            raise
        said = self._process.stderr.decode(errors="replace").strip()
        raise DemoError(f"{self.name}: vbus guest run ended with {status}: {said}")

    async def traffic(self, *words: str) -> str:
        return (await self._vm.run(*_TRAFFIC, *words)).stdout

    async def start_traffic(self, *words: str) -> Output:
        return Output(aiter(await self._vm.start(*_TRAFFIC, *words)))


class MachineStage(Stage):
    """A stage on which the guests named in `machines` are virtual machines."""

    def __init__(
        self, nursery: trio.Nursery, folder: Path, machines: Mapping[str, Iommu | None]
    ) -> None:
        """`machines`: the IOMMU that each has. Raises as `prepare` does."""
        super().__init__(nursery, folder, networks=True)
        self._machines = machines
        self._image = image.cached()
        self._qemu = qemu.fetch()
        chosen = accelerator.choose(self._qemu, self._image)
        self.accelerator = "KVM" if chosen == "kvm" else "TCG"

    async def guest(self, name: str, *options: str) -> Guest:
        if name not in self._machines:
            return await super().guest(name, *options)
        vm: VirtualMachine = await self.nursery.start(self._run, name)
        process = await vm.start("vbus", "guest", "run", "--json", *options)
        guest = MachineGuest(name, vm, process)
        self.nursery.start_soon(guest.listen, guest.lines())
        return guest

    async def _run(
        self, name: str, *, task_status: trio.TaskStatus[VirtualMachine]
    ) -> None:
        async with boot(
            self._image,
            [self.socket(name)],
            iommu=self._machines[name],
            log=self.folder / f"{name}-{time.monotonic_ns()}",
            emulator=self._qemu,
        ) as vm:
            task_status.started(vm)
            await vm.wait_gone()
