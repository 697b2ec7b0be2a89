"""`vbus guest run` and `scan` inside of a real guest, without an IOMMU (by uio)."""

import hashlib
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "lan0-vm1"
class = "venet"
bus = "bus0"
switch = "lan0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
[[guest]]
name = "vm2"
bus = "bus0"
"""
HOST, GUEST = "10.87.3.1", "10.87.3.2"
UPLINK = f"""
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "vbvm0"
address = "{HOST}/24"
"""
PORT = 5201
MB = 1 << 20
WITHIN_S = 60


@asynccontextmanager
async def running(vm: VirtualMachine, *words: str) -> AsyncIterator[GuestProcess]:
    """`vbus guest run`, ended by SIGTERM; its end is checked."""
    process = await vm.start("vbus", "guest", "run", "--json", *words)
    try:
        yield process
        process.signal(signal.SIGTERM)
        with trio.fail_after(WITHIN_S):
            assert await process.wait() == 0, process.stderr
    finally:
        process.end()


async def told(process: GuestProcess, **wanted: object) -> dict[str, Any]:
    """Wait for a line of its output; states of failure end the wait."""
    with trio.fail_after(WITHIN_S):
        async for line in process:
            event: dict[str, Any] = json.loads(line)
            if wanted.items() <= event.items():
                return event
            assert event.get("state") != "failed", event
    raise AssertionError(f"it ended before {wanted}: {process.stderr!r}")


async def statistics(process: GuestProcess) -> dict[str, Any]:
    process.signal(signal.SIGUSR1)
    return await told(process, event="statistics")


async def refused(vm: VirtualMachine, *words: str) -> str:
    """Run it, and give the one line in which it says why not."""
    done = await vm.run("vbus", "guest", "run", *words, check=False)
    assert done.status == 1
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def send(host: str, port: int, size: int) -> str:
    """In the guest: send so many bytes, and give their checksum."""
    import hashlib
    import os
    import socket

    state = hashlib.sha256()
    block = os.urandom(1 << 20)
    with socket.create_connection((host, port)) as sock:
        for number in range(size >> 20):
            part = number.to_bytes(8, "little") + block[8:]
            state.update(part)
            sock.sendall(part)
    return state.hexdigest()


async def receive(listener: trio.SocketListener) -> tuple[int, str]:
    """On the host: take one connection to its end; bytes and checksum."""
    state, size = hashlib.sha256(), 0
    async with await listener.accept() as stream:
        async for part in stream:
            state.update(part)
            size += len(part)
    return size, state.hexdigest()


@isolated
async def test_without_options_the_interface_is_there_and_moves_bulk_data(
    daemon: Daemon, boot: Boot
) -> None:
    """R1, R50, R61: no IOMMU, nothing prepared: modules, pages and TAP are its own."""
    # The isolated child ends its own daemon: the fixture ends nothing there.
    with daemon(CONFIG + UPLINK) as served:
        await interface_and_bulk_data(served, boot)


async def interface_and_bulk_data(served: Served, boot: Boot) -> None:
    async with boot(served.socket("vm1"), iommu=None) as vm:
        began = trio.current_time()
        async with running(vm, "--address", f"lan0-vm1={GUEST}/24") as process:
            way = await told(process, event="function")
            assert re.search(r"by uio \(no IOMMU\), without inter", way["detail"])
            attached = await told(process, event="attached")
            assert (attached["queues"], attached["vectors"]) == (8, 1)
            print(f"attached after {trio.current_time() - began:.1f} s")
            up = await told(process, name="lan0-vm1", state="running")
            assert up["detail"].startswith("lan0-vm1, ")
            offloads = (await vm.run("ethtool", "-k", "lan0-vm1")).stdout
            assert "tcp-segmentation-offload: on" in offloads
            print((await vm.run("ping", "-c", "5", "-i", "0.2", HOST)).stdout)
            await check_transfer(vm, process, 64 * MB)
        (guest,) = served.ask("guest", "show", "vm1")
        assert guest["connections"] == []
        assert "lan0-vm1" not in (await vm.run("ls", "/sys/class/net")).stdout


async def check_transfer(vm: VirtualMachine, process: GuestProcess, size: int) -> None:
    """TCP from guest to host crosses unsegmented and whole."""
    (listener,) = await trio.open_tcp_listeners(PORT, host=HOST)
    before = await frames(process)
    began = trio.current_time()
    sums: list[str] = []
    async with listener, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            sums.append(await vm.python(send, HOST, PORT, size))

        received, checksum = await receive(listener)
    seconds = trio.current_time() - began
    assert (received, [checksum]) == (size, sums)
    after = await frames(process)
    mean = size / (after["tx_frames"] - before["tx_frames"])
    print(f"{size / MB / seconds:.0f} MB/s with checksums, {mean:.0f} bytes a frame")
    assert mean > 10_000
    assert after["tx_errors"] == after["rx_errors"] == 0


async def frames(process: GuestProcess) -> dict[str, int]:
    devices = (await statistics(process))["devices"]
    found: dict[str, int] = devices["lan0-vm1"]["driver"]["frames"]
    return found


async def test_several_bridges_are_told_apart_and_have_one_user_each(
    daemon: Daemon, boot: Boot
) -> None:
    """R61: scan shows what is behind each; run wants to know which."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), served.socket("vm2"), iommu=None) as vm:
        found = await scanned(vm)
        first, second = found
        assert set(found[first]["devices"]) == {"lan0-vm1", "echo0"}
        assert [one["state"] for one in found.values()] == ["free", "free"]
        assert f"take --device {first} or {second}" in await refused(vm)
        async with running(vm, "--device", first, "--frames") as process:
            await told(process, name="echo0", state="running")
            assert "in use by another" in await refused(vm, "--device", first)
            found = await scanned(vm)
            assert found[first]["state"].startswith("busy: ")
            assert found[second]["state"] == "free"
            async with running(vm, "--device", second, "--frames") as other:
                await told(other, event="attached")
        lines = (await vm.run("vbus", "guest", "scan")).stdout.splitlines()
        assert lines[0] == f"{first}  uio_pci_generic  free"
        assert lines[1].split() == ["lan0-vm1", "virtual-ethernet", "id", "0"]


async def scanned(vm: VirtualMachine) -> dict[str, Any]:
    shown = json.loads((await vm.run("vbus", "guest", "scan", "--json")).stdout)
    return {one["address"]: one for one in shown}


async def test_a_killed_run_leaves_nothing_behind(daemon: Daemon, boot: Boot) -> None:
    """R50: the kernel ends bus mastering with the process, the host what it held."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), iommu=None) as vm:
        process = await vm.start("vbus", "guest", "run", "--json", "--frames")
        await told(process, name="lan0-vm1", state="running")
        assert served.ask("guest", "show", "vm1")[0]["connections"] != []
        process.signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        assert served.ask("guest", "show", "vm1")[0]["connections"] == []
        free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
        assert (await vm.get(free)).strip() == b"32"
        async with running(vm, "--frames") as process:
            await told(process, name="lan0-vm1", state="running")


async def test_what_is_missing_is_told_with_the_command_that_helps(
    daemon: Daemon, boot: Boot
) -> None:
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), iommu=None) as vm:
        hidden = await vm.python(hide_module, "uio_pci_generic")
        assert "modprobe uio_pci_generic failed: " in await refused(vm)
        done = await vm.run(*as_nobody(), check=False)
        assert (done.status, done.stderr.count("\n")) == (1, 1)
        assert "run this as root" in done.stderr
        await vm.run("mv", f"{hidden}.hidden", hidden)
        lack = await refused(vm, "--memory-mib", "4096")
        assert re.search(r"2048 huge pages .* run: sysctl vm.nr_hugepages=2048$", lack)
        await vm.python(hide_module, "tun")
        async with running(vm) as process:
            failed = await told(process, name="lan0-vm1", state="failed")
            assert failed["detail"].startswith("modprobe tun failed: ")
        done = await vm.run(*as_nobody(), check=False)
        assert "run this as root" in done.stderr


def as_nobody() -> list[str]:
    """`vbus guest run` without rights."""
    code = (
        "import os; os.setgid(65534); os.setuid(65534);"
        "os.execvp('vbus', ['vbus', 'guest', 'run'])"
    )
    return ["python3", "-c", code]


def hide_module(name: str) -> str:
    """In the guest: take a module's file away, and give where it was."""
    import glob
    import os

    (path,) = glob.glob(f"/lib/modules/**/{name}.ko*", recursive=True)
    os.rename(path, f"{path}.hidden")
    return path
