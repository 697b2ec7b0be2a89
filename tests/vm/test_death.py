"""A machine ends in the middle of bulk transfers; the others' go on, whole (issue 3).

The machine sends and receives without end, to and from the host, while a guest that is
a process and the host send each other data with checksums over the same switch.
"""

import inspect
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import here, process_guest, receive, send
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import told
from tests.vm.test_life import asked, connections, held, open_echo, until
from tests.vm.test_network import ADDRESSES, HOST
from tests.vm.test_network import CONFIG as NETWORK
from tests.vm.test_vfio import bridge_address
from vbus.vm.arguments import Iommu
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

CONFIG = NETWORK
MB = 1 << 20
PART = 16 * MB
PORT, SINK, SOURCE = 5401, 5402, 5403
FLOOD_S = 5
RSS_BOUND = 24 * MB
WITHIN_S = 60
PAGES = ("guest.hugepages=40",)
SYSFS = "/sys/bus/pci/devices"


class Others:
    """The process and the host move data both ways, part after part, for ever."""

    def __init__(self, prefix: tuple[str, ...]) -> None:
        self._process = partial(here, prefix=prefix)
        self.parts = 0

    async def run(self) -> None:
        while True:
            await self._move(self._process, here, HOST)
            await self._move(here, self._process, ADDRESSES["p3"])

    async def _move(
        self,
        source: Callable[..., Awaitable[str]],
        sink: Callable[..., Awaitable[str]],
        address: str,
    ) -> None:
        sums: list[str] = []

        async def take() -> None:
            sums.append(await sink(receive, PORT))

        with trio.fail_after(WITHIN_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take)
                sums.append(await source(send, address, PORT, PART))
        assert sums[0] == sums[1]
        assert sums[0].startswith(f"{PART} ")
        self.parts += 1

    async def go_on(self) -> None:
        """Wait for the part under way, and one that begins from now on."""
        wanted = self.parts + 2
        with trio.fail_after(WITHIN_S):
            while self.parts < wanted:  # noqa: ASYNC110
                await trio.sleep(0.05)


@asynccontextmanager
async def others_at_work(served: Served) -> AsyncIterator[Others]:
    async with (
        process_guest(served, "p3", f"net-p3={ADDRESSES['p3']}/24") as prefix,
        trio.open_nursery() as nursery,
    ):
        others = Others(prefix)
        nursery.start_soon(others.run)
        await others.go_on()
        yield others
        await others.go_on()
        nursery.cancel_scope.cancel()


def transfer(host: str, sink: int, source: int) -> None:
    """In the guest: send and receive until killed."""
    import socket
    import threading

    def take() -> None:
        with socket.create_connection((host, source)) as sock:
            while sock.recv(1 << 20):
                pass

    threading.Thread(target=take, daemon=True).start()
    with socket.create_connection((host, sink)) as sock:
        while True:
            sock.sendall(bytes(1 << 20))


class Bulk:
    """The host's ends of the machine's transfers."""

    def __init__(self) -> None:
        self.taken = self.given = 0

    async def serve(self, nursery: trio.Nursery) -> None:
        for port, handler in ((SINK, self._take), (SOURCE, self._give)):
            await nursery.start(partial(trio.serve_tcp, handler, port, host=HOST))

    async def _take(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async for part in stream:
                self.taken += len(part)

    async def _give(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(bytes(1 << 18))
                self.given += 1 << 18

    async def flows(self) -> None:
        """Wait until a megabyte more has gone each way."""
        taken, given = self.taken + MB, self.given + MB
        with trio.fail_after(WITHIN_S):
            while self.taken < taken or self.given < given:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def begin(vm: VirtualMachine, bulk: Bulk) -> list[GuestProcess]:
    """Have the machine attach and transfer, both in the background."""
    words = ("--address", f"net-vm1={ADDRESSES['vm1']}/24")
    process = await vm.start("vbus", "guest", "run", "--json", *words)
    await told(process, name="net-vm1", state="running")
    code = f"{inspect.getsource(transfer)}\ntransfer({HOST!r}, {SINK}, {SOURCE})"
    sender = await vm.start("python3", "-c", code)
    await bulk.flows()
    return [process, sender]


async def kill(processes: list[GuestProcess]) -> None:
    for process in processes:
        process.signal(signal.SIGKILL)
        await process.wait()


async def reset(vm: VirtualMachine, served: Served, iommu: Iommu | None) -> None:
    """The bridge's own ways, behind the driver's back; it has no other (docs/qemu.md).

    Without an IOMMU before it a NEGOTIATE from other memory (ABI 2.3); then bus
    mastering off (ABI 12.2).
    """
    if iommu is None:
        before = await asked(served, "stats", path="guests/vm1/bridge")
        assert await vm.python(open_echo) == {"result": 0}
        after = await asked(served, "stats", path="guests/vm1/bridge")
        assert after["resets"] == before["resets"] + 1
        assert (after["connections"], after["signals"], after["queues"]) == (1, 0, 0)
    address = await bridge_address(vm)
    assert (await vm.run("ls", f"{SYSFS}/{address}/reset", check=False)).status
    await vm.run("setpci", "-s", address, "COMMAND.W=0003")
    assert await connections(served) == []


def rss(served: Served) -> int:
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    return int(kib) << 10


def flood(mac: bytes, seconds: float) -> int:
    """Send full frames to an address as fast as the interface takes them."""
    import time

    frame = mac + b"\x02\0\0\0\0\x01" + b"\x88\xb6" + bytes(1486)
    sent, end = 0, time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("vbnet0", 0))
        while time.monotonic() < end:
            with suppress(OSError):  # ENOBUFS: the interface has no room just now
                sock.send(frame)
                sent += len(frame)
    return sent


async def hang(vm: VirtualMachine, served: Served, bulk: Bulk, others: Others) -> None:
    """It stands still; who sends to it fills nobody's memory, and it comes back."""
    text = (await vm.run("cat", "/sys/class/net/net-vm1/address")).stdout
    mac = bytes.fromhex(text.strip().replace(":", ""))
    os.kill(vm.pid, signal.SIGSTOP)
    await trio.to_thread.run_sync(flood, mac, 1)
    before = rss(served)
    sent = await trio.to_thread.run_sync(flood, mac, FLOOD_S)
    grown = rss(served) - before
    print(
        f"hung: {sent / MB:.0f} MB sent to it, the daemon grew by {grown / MB:.1f} MB"
    )
    assert sent > 4 * RSS_BOUND
    assert grown < RSS_BOUND
    await others.go_on()
    assert await connections(served) == ["net-vm1"]
    os.kill(vm.pid, signal.SIGCONT)
    await bulk.flows()


@pytest.mark.parametrize("iommu", ["intel", None])
@isolated
async def test_a_death_in_the_middle_of_a_transfer_hurts_nobody_else(
    daemon: Daemon, boot: Boot, iommu: Iommu | None
) -> None:
    """R50, R61: hung and back, reset by a register, rebooted, killed."""
    # The isolated child ends its own daemon: the fixture ends nothing there.
    with daemon(CONFIG) as served:
        await deaths(served, boot, iommu)


async def deaths(served: Served, boot: Boot, iommu: Iommu | None) -> None:
    async with others_at_work(served) as others, trio.open_nursery() as nursery:
        bulk = Bulk()
        await bulk.serve(nursery)
        before = await held(served)
        async with boot(served.socket("vm1"), iommu=iommu, words=PAGES) as vm:
            attached = await held(served)
            processes = await begin(vm, bulk)
            await hang(vm, served, bulk, others)

            await reset(vm, served, iommu)
            await others.go_on()
            await kill(processes)
            await until(lambda: held(served), attached)
            await begin(vm, bulk)

            await vm.reboot()
            assert await connections(served) == []
            await others.go_on()
            await begin(vm, bulk)

            await vm.kill()
            await others.go_on()
            await until(lambda: held(served), before)
            assert await connections(served) == []
        print(await asked(served, "stats", path="guests/vm1/server"))
        print(f"{others.parts} parts of {PART / MB:.0f} MB between the others, whole")
        nursery.cancel_scope.cancel()
