"""The two ways to one virtio model, side by side: the bridge, and a PCI function."""

import hashlib
import inspect
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import transfer
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import running, told
from tests.vm.test_virtio_linux import (
    MODULES,
    check_fio,
    counted,
    function_of,
    sh,
)
from tests.vm.test_virtio_linux import image as image
from vbus.vm.machine import VirtualMachine

MB = 1 << 20
SIZE = 64 * MB
PART = 16 * MB
RECORD, RECORDS = 4096, 256
FLUSHES = 20
WITHIN_S = 60
BRIDGE = """
[[bus]]
name = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
"""
BY_BRIDGE, BY_FUNCTION = "10.87.10.1", "10.87.10.2"
NETWORK = (
    BRIDGE
    + """
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "card0"
class = "virtio-net"
bus = "bus0"
switch = "lan0"
[[device]]
name = "net0"
class = "virtio-net"
expose = "pci"
switch = "lan0"
"""
)


def show(served: Served, path: Path, *words: str) -> None:
    """Have the daemon show the image's disk in one of the ways."""
    about = ("--class", "virtio-blk", f"path={path}", f"size={SIZE}")
    done = served.vbus("device", "add", "disk0", *about, *words)
    assert done.returncode == 0, done.stderr


def hide(served: Served) -> None:
    assert served.vbus("device", "del", "disk0").returncode == 0


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


async def read_whole(vm: VirtualMachine, node: str) -> str:
    """In the guest: the checksum of a disk, past the guest's page cache."""
    return (await sh(vm, f"dd if={node} bs=1M iflag=direct | md5sum")).split()[0]


@asynccontextmanager
async def kernels_disk(vm: VirtualMachine) -> AsyncIterator[str]:
    """The disk behind the bridge as /dev/nbdN of the guest's kernel."""
    async with running(vm) as process:
        up = await told(process, name="disk0", state="running")
        yield up["detail"].split(", ")[1]


async def test_linux_reads_an_image_identically_by_both_ways(
    tmp_path: Path, daemon: Daemon, boot: Boot
) -> None:
    """R13, R62: written by one way under fio's eyes, read by the other; and back."""
    path = tmp_path / "image"
    served = daemon(BRIDGE)
    show(served, path, "--expose", "pci")
    sockets = [function_of(served, "disk0"), served.socket("vm1")]
    async with boot(*sockets, iommu=None, words=[MODULES]) as vm:
        await check_fio(vm)
        written = await read_whole(vm, "/dev/vda")
        assert written == digest(path)
        hide(served)
        show(served, path, "--bus", "bus0")
        async with kernels_disk(vm) as node:
            assert await read_whole(vm, node) == written
            await check_fio(vm, node, part=8)
            rewritten = await read_whole(vm, node)
            assert counted_errors(served) == 0
        assert rewritten == digest(path) != written
        hide(served)
    show(served, path, "--expose", "pci")
    async with boot(function_of(served, "disk0"), iommu=None, words=[MODULES]) as vm:
        assert await read_whole(vm, "/dev/vda") == rewritten
        assert counted(served, "disk0")["io"]["errors"] == 0


def counted_errors(served: Served) -> int:
    errors: int = served.ask("stats", "devices/disk0/io/errors")
    return errors


@isolated
async def test_tcp_is_whole_between_a_machine_with_a_bridge_and_one_with_a_function(
    daemon: Daemon, boot: Boot
) -> None:
    """R13, R62: two machines, one switch; bulk data with checksums both ways."""
    # The isolated child ends its own daemon: the fixture ends nothing there.
    with daemon(NETWORK) as served:
        await between_machines(served, boot)


async def between_machines(served: Served, boot: Boot) -> None:
    words = [MODULES]
    async with (
        boot(served.socket("vm1"), iommu=None) as bridged,
        boot(function_of(served, "net0"), iommu=None, words=words) as shown,
        running(bridged, "--address", f"card0={BY_BRIDGE}/24") as process,
    ):
        await told(process, name="card0", state="running")
        await sh(shown, f"ip addr add {BY_FUNCTION}/24 dev eth0; ip link set eth0 up")
        there, back = bridged.python, shown.python
        move = partial(transfer, size=PART)
        await move(there, back, BY_FUNCTION, "bridge to function")
        await move(back, there, BY_BRIDGE, "function to bridge")
        for name in ("card0", "net0"):
            counters = await trio.to_thread.run_sync(
                served.ask, "stats", f"devices/{name}/io"
            )
            assert counters["tx_bytes"] > PART
            assert counters["tx_errors"] == 0


def write_records(node: str, count: int, size: int) -> None:
    """In the guest: write records at random; say after each fsync what it covers."""
    import os
    import random

    fd = os.open(node, os.O_RDWR)
    generation = 0
    while True:
        generation += 1
        numbers = random.sample(range(count), 24)
        for number in numbers:
            unit = number.to_bytes(8, "little") + generation.to_bytes(8, "little")
            os.pwrite(fd, unit * (size // len(unit)), number * size)
        os.fsync(fd)
        print(generation, *numbers, flush=True)


def check_records(image: bytes, covered: dict[int, int]) -> None:
    """Each record is whole, and none is older than the last fsync that covers it."""
    for number, generation in covered.items():
        found = image[number * RECORD : (number + 1) * RECORD]
        unit = found[:16]
        assert found == unit * (RECORD // 16), f"record {number} is torn"
        assert int.from_bytes(unit[:8], "little") == number
        assert int.from_bytes(unit[8:], "little") >= generation, f"record {number}"


@pytest.mark.parametrize("words", ["--expose pci", "--bus bus0"])
async def test_a_killed_daemon_loses_nothing_that_linux_flushed(
    tmp_path: Path, daemon: Daemon, boot: Boot, words: str
) -> None:
    """R13, R24: kill -9 between two fsyncs; the image has all that one covered."""
    path = tmp_path / "image"
    served = daemon(BRIDGE)
    show(served, path, *words.split())
    exposed = "pci" in words
    socket = function_of(served, "disk0") if exposed else served.socket("vm1")
    async with boot(socket, iommu=None, words=[MODULES]) as vm:
        node = "/dev/vda"
        if not exposed:
            run = await vm.start("vbus", "guest", "run", "--json")
            up = await told(run, name="disk0", state="running")
            node = up["detail"].split(", ")[1]
        source = f"{inspect.getsource(write_records)}\nwrite_records"
        call = f"{source}({node!r}, {RECORDS}, {RECORD})"
        writer = await vm.start("python3", "-c", call)
        covered: dict[int, int] = {}
        with trio.fail_after(WITHIN_S):
            for _ in range(FLUSHES):
                generation, *numbers = map(int, (await anext(writer)).split())
                covered |= dict.fromkeys(numbers, generation)
        served.process.kill()
        assert served.process.wait() == -signal.SIGKILL
        print(f"{len(covered)} records of {FLUSHES} flushes")
        check_records(path.read_bytes(), covered)
