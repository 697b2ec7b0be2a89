"""Lives and deaths of a real machine: the daemon frees all, and others go on (issue 3).

The guest's side is a driver of its own, of a few lines: it sets up as a driver does and
then leaves everything open, so that there is something to free.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.bridge import BridgeDriver
from proxy.guest import attach
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from vbus.control.client import ControlClient
from vbus.vm.arguments import Iommu
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[device]]
name = "echo1"
class = "echo"
bus = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
[[guest]]
name = "plain"
bus = "bus0"
msix = false
[[guest]]
name = "process"
bus = "bus0"
"""
HUGE_PAGES = ("guest.hugepages=4",)
EFAULT = 14


def open_echo(call_at: int | None = None) -> dict[str, int]:
    """In the guest: NEGOTIATE, a call channel, DEVOPEN; nothing is closed after.

    With `call_at` the first call points there, and its result is given.
    """
    import ctypes
    import mmap
    import os
    import struct
    from pathlib import Path

    from shm import AddressSpace, create_memfd
    from vbus import abi

    size = 2 << 20
    fd = create_memfd("driver", size, huge=True)
    memory = mmap.mmap(fd, size)
    memory[0] = 0
    virtual = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    (entry,) = struct.unpack("Q", os.pread(pagemap, 8, virtual // 4096 * 8))
    base = (entry & ((1 << 55) - 1)) * 4096
    space = AddressSpace()
    space.map(base, size, fd)

    devices = Path("/sys/bus/pci/devices")
    (where,) = (
        one for one in devices.iterdir() if (one / "vendor").read_text()[:6] == "0x11da"
    )
    if (where / "enable").read_text().strip() == "0":  # no driver has it
        (where / "enable").write_text("1")
    with (where / "config").open("r+b", buffering=0) as config:
        os.pwrite(config.fileno(), b"\7\0", 4)
    calls_fd = os.open(where / "resource0", os.O_RDWR | os.O_SYNC)
    ports_fd = os.open(where / "resource1", os.O_RDWR)
    registers = memoryview(mmap.mmap(calls_fd, 64)).cast("I")

    def bridge_call(vector: int, argument: bytes, at: int) -> int:
        if call_at is None:
            space.write(at, argument)
        words = abi.CALL.pack(abi.CallDescriptor(vector, len(argument), at))
        for nth, (word,) in enumerate(struct.iter_unpack("I", words)):
            registers[nth] = word
        return ctypes.c_int32(registers[0]).value

    negotiate = abi.NEGOTIATE.pack(abi.Negotiate(abi.NEGOTIATE_MAGIC, 1, 0))
    result = bridge_call(0, negotiate, base if call_at is None else call_at)
    if call_at is not None or result < 0:
        return {"result": result}
    channel = base + 0x1000
    added = abi.CALL.pack(abi.CallDescriptor(0, abi.FASTCALL.size, channel))
    result = bridge_call(3, added, base)
    assert result == 0, result
    argument = base + 0x2000
    space.write(argument, abi.DEVOPEN.pack(abi.DeviceOpen(0, 1, 0)))
    call = abi.FastCall(0, abi.DEVOPEN.size, argument, -1)
    space.write(channel, abi.FASTCALL.pack(call))
    os.pwrite(ports_fd, bytes(4), abi.SIGNAL_FASTCALL)
    (result,) = struct.unpack("i", space.read(channel + abi.RESULT_OFFSET, 4))
    return {"result": result}


# What the daemon has


async def asked(daemon: Served, op: str, **args: object) -> Any:
    async with ControlClient(daemon.runtime / "control.sock") as control:
        return await control.request(op, **args)


async def shown(daemon: Served, guest: str = "vm1") -> dict[str, Any]:
    (about,) = await asked(daemon, "guest.show", name=guest)
    return dict(about)


async def held(daemon: Served) -> tuple[int, int, int]:
    """Descriptors, mappings of guest memory and tasks."""
    tasks = (await asked(daemon, "stats", path="daemon"))["tasks"]
    return daemon.fds, daemon.mappings, tasks


async def until(check: Callable[[], Any], wanted: object, within_s: float = 60) -> None:
    found = None
    with trio.move_on_after(within_s):
        while (found := await check()) != wanted:  # noqa: ASYNC110
            await trio.sleep(0.05)
    assert found == wanted


async def connections(daemon: Served) -> list[str]:
    return list((await shown(daemon))["connections"])


class Bystander:
    """A guest that is a process, whose calls must go on whatever happens."""

    def __init__(self, bridge: BridgeDriver) -> None:
        self.bridge = bridge
        self.calls = 0

    async def run(self, handle: Any) -> None:
        while True:
            data = os.urandom(64)
            with trio.fail_after(60):
                assert await handle.call(0, data) == (0, data)
            self.calls += 1

    async def goes_on(self) -> None:
        """Wait for a hundred more calls."""
        wanted = self.calls + 100
        with trio.fail_after(60):
            while self.calls < wanted:  # noqa: ASYNC110
                await trio.sleep(0.005)


@asynccontextmanager
async def bystander(socket: Path) -> AsyncIterator[Bystander]:
    async with attach(socket, memory_mib=4) as bridge, trio.open_nursery() as nursery:
        one = Bystander(bridge)
        handle = await bridge.open("echo1")
        nursery.start_soon(one.run, handle)
        yield one
        nursery.cancel_scope.cancel()


async def hold_by_hand(vm: VirtualMachine, daemon: Served) -> None:
    assert await vm.python(open_echo) == {"result": 0}
    assert await connections(daemon) == ["echo0"]


HOLD = """
import trio
from proxy.guest import attach
async def main():
    async with attach(memory_mib=4) as bridge:
        await bridge.open("echo0")
        await trio.sleep_forever()
trio.run(main)
"""


class Vfio:
    """Holds by a process with the function behind the IOMMU, killed for the next."""

    def __init__(self) -> None:
        self._process: GuestProcess | None = None

    async def take_hold(self, vm: VirtualMachine, daemon: Served) -> None:
        if self._process is not None and await connections(daemon):
            self._process.signal(signal.SIGKILL)
            assert await self._process.wait() == -signal.SIGKILL
            assert await connections(daemon) == []
        self._process = await vm.start("python3", "-c", HOLD)
        await until(lambda: connections(daemon), ["echo0"])


@pytest.mark.parametrize("iommu", [None, "intel"])
async def test_every_end_of_a_life_frees_what_it_held(
    daemon: Daemon, boot: Boot, iommu: Iommu | None
) -> None:
    """R50, R61: stopped, hung, reset, rebooted, killed, replaced at once."""
    served = daemon(CONFIG)
    options = {"iommu": iommu, "words": HUGE_PAGES}
    take_hold = hold_by_hand if iommu is None else Vfio().take_hold
    async with bystander(served.socket("process")) as other:
        before = await held(served)
        async with boot(served.socket("vm1"), **options) as vm:
            await take_hold(vm, served)

            await vm.qmp.execute("stop")
            await other.goes_on()
            await vm.qmp.execute("cont")
            await take_hold(vm, served)

            os.kill(vm.pid, signal.SIGSTOP)
            await other.goes_on()
            os.kill(vm.pid, signal.SIGCONT)
            await take_hold(vm, served)

            resets = (await shown(served))["since_attach"]["resets"]
            await vm.reboot()
            assert await connections(served) == []
            assert (await shown(served))["since_attach"]["resets"] > resets
            await take_hold(vm, served)

            await vm.start("reboot", "-f")
            await vm.wait_up()
            assert await connections(served) == []
            await take_hold(vm, served)
            counted = (await shown(served))["since_attach"]
            print("three boots:", counted)
            assert counted["config_reads"] > 100
            await vm.kill()
        async with boot(served.socket("vm1"), **options) as vm:
            await other.goes_on()
            await take_hold(vm, served)
        await until(lambda: held(served), before)
        assert await connections(served) == []
        await other.goes_on()


async def test_calls_that_point_outside_the_memory_fail_alone(
    daemon: Daemon, boot: Boot
) -> None:
    """R50: holes, other devices' registers and the top of the addresses: EFAULT."""
    served = daemon(CONFIG)
    options = {"iommu": None, "words": HUGE_PAGES}
    async with (
        bystander(served.socket("process")) as other,
        boot(served.socket("vm1"), **options) as vm,
    ):
        for at in (1 << 40, 0xFEC0_0000, (1 << 64) - 8, 768 << 20):
            assert await vm.python(open_echo, at) == {"result": -EFAULT}
            await other.goes_on()
        await hold_by_hand(vm, served)


async def test_memory_that_is_not_shared_is_refused_by_name(
    daemon: Daemon, boot: Boot
) -> None:
    """The guest gets EFAULT, the log one line that names QEMU's option."""
    served = daemon(CONFIG)
    options = {"iommu": None, "words": HUGE_PAGES, "shared": False}
    async with boot(served.socket("vm1"), **options) as vm:
        assert await vm.python(open_echo) == {"result": -EFAULT}
        assert await vm.python(open_echo) == {"result": -EFAULT}
    assert served.log.read_text().count("share=on") == 1
    counted = (await shown(served))["since_attach"]
    assert counted["unbacked_maps"] == counted["dma_maps"] > 0


async def plugged(vm: VirtualMachine) -> bool:
    return "11da:2000" in (await vm.run("lspci", "-n")).stdout


@pytest.mark.parametrize("rounds", [2])
async def test_a_function_without_msix_can_be_unplugged(
    daemon: Daemon, boot: Boot, rounds: int
) -> None:
    """With MSI-X, QEMU 11.1.3 aborts: see docs/qemu.md."""
    served = daemon(CONFIG)
    path = str(served.socket("plain"))
    async with boot(iommu=None, words=HUGE_PAGES, root_ports=1) as vm:
        before = await held(served)
        for _ in range(rounds):
            await vm.qmp.execute(
                "device_add",
                driver="vfio-user-pci",
                id="plugged",
                bus="port0",
                socket={"type": "unix", "path": path},
            )
            await until(lambda: plugged(vm), wanted=True)
            assert await vm.python(open_echo) == {"result": 0}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.qmp.wait_event, "DEVICE_DELETED")
                await vm.qmp.execute("device_del", id="plugged")
            assert not await plugged(vm)
            await until(lambda: held(served), before)
