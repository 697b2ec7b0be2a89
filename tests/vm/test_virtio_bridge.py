"""Virtio devices behind the bridge of a real virtual machine, for the kernel in it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import here, receive, send
from tests.vm.conftest import Boot
from tests.vm.test_guest_run import running, told
from vbus.vm.machine import VirtualMachine

HOST, GUEST = "10.9.1.1", "10.9.1.2"
PORT = 5301
MB = 1 << 20
PART_TIME_S = 60


def config(folder: Path) -> str:
    return f"""
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "vbvirt0"
address = "{HOST}/24"
[[device]]
name = "card0"
class = "virtio-net"
bus = "bus0"
switch = "lan0"
[[device]]
name = "disk0"
class = "virtio-blk"
bus = "bus0"
path = "{folder / "image"}"
size = "96M"
[[device]]
name = "tty0"
class = "virtio-console"
bus = "bus0"
to = "unix:{folder / "tty"}"
[[device]]
name = "rng0"
class = "virtio-rng"
bus = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
"""


def fill(folder: str, size: int) -> str:
    """In the guest: files until there are so many bytes, and a checksum of all."""
    import os
    import zlib

    state = 0
    for number in range(size >> 20):
        data = os.urandom(1 << 20)
        state = zlib.crc32(data, state)
        with open(f"{folder}/{number}", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    return f"{state:08x}"


def read_back(folder: str, size: int) -> str:
    """In the guest: the checksum of what `fill` wrote."""
    import zlib

    state = 0
    for number in range(size >> 20):
        with open(f"{folder}/{number}", "rb") as file:
            state = zlib.crc32(file.read(), state)
    return f"{state:08x}"


async def check_disk(vm: VirtualMachine, node: str, image: Path) -> None:
    """ext4 made, filled, unmounted, clean; and the same after another mount."""
    size = 32 * MB
    await vm.run("modprobe", "ext4")
    await vm.run("mkfs.ext4", "-q", "-F", node, timeout_s=PART_TIME_S)
    await vm.run("mkdir", "-p", "/mnt/d")
    await vm.run("mount", "-t", "ext4", node, "/mnt/d")
    wrote = await vm.python(fill, "/mnt/d", size)
    await vm.run("umount", "/mnt/d")
    checked = await vm.run("e2fsck", "-f", "-n", node, timeout_s=PART_TIME_S)
    print(checked.stdout.splitlines()[-1])
    await vm.run("mount", "-t", "ext4", "-o", "ro", node, "/mnt/d")
    assert await vm.python(read_back, "/mnt/d", size) == wrote
    await vm.run("umount", "/mnt/d")
    with image.open("rb") as file:
        file.seek(1024 + 56)
        assert file.read(2) == b"\x53\xef"  # ext4's magic, in the host's file
    assert os.stat(image).st_blocks * 512 >= size


async def check_console(vm: VirtualMachine, terminal: str, path: Path) -> None:
    """A shell on the guest's terminal answers on the host's socket."""
    script = f"setsid sh <{terminal} >{terminal} 2>&1 & echo started"
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await vm.run("sh", "-c", script)
        await stream.send_all(b"echo $((6 * 7)); exit\n")
        said = b""
        with trio.fail_after(PART_TIME_S):
            while b"42" not in said:
                said += await stream.receive_some()


async def check_network(vm: VirtualMachine) -> None:
    """Bulk TCP with checksums to the host, and back."""
    size = 32 * MB
    sums: dict[str, str] = {}

    async def at_host(function: Callable[..., str], *arguments: object) -> None:
        sums["host"] = await here(function, *arguments)

    with trio.fail_after(PART_TIME_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at_host, receive, PORT)
            sent = await vm.python(send, HOST, PORT, size)
        assert sums["host"] == sent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at_host, send, GUEST, PORT, size)
            received = await vm.python(receive, PORT)
        assert received == sums["host"]


@pytest.mark.parametrize("iommu", [None, "intel"])
@isolated
async def test_the_kernel_uses_every_kind(
    boot: Boot, tmp_path: Path, iommu: str | None
) -> None:
    """R13, R61: ext4 on /dev/nbd0, TCP over a TAP, a shell, a fed pool of entropy."""
    with Served(tmp_path, config(tmp_path)) as served:
        async with (
            boot(served.socket("vm1"), iommu=iommu) as vm,
            running(vm, "--address", f"card0={GUEST}/24") as process,
        ):
            ready = dict.fromkeys(("card0", "disk0", "tty0", "rng0"), "")
            while not all(ready.values()):
                up = await told(process, event="device", state="running")
                ready[up["name"]] = up["detail"]
            assert ready["rng0"] == "feeds /dev/random"
            node = ready["disk0"].split(", ")[1]
            assert node.startswith("/dev/nbd")
            began = trio.current_time()
            await check_disk(vm, node, tmp_path / "image")
            print(f"disk: {trio.current_time() - began:.1f} s")
            assert served.vbus("device", "set", "disk0", "size=128M").returncode == 0
            sectors = f"/sys/block/{node.removeprefix('/dev/')}/size"
            with trio.fail_after(PART_TIME_S):
                while (await vm.run("cat", sectors)).stdout.strip() != str(256 << 10):
                    pass
            await check_network(vm)
            print(f"and network: {trio.current_time() - began:.1f} s")
            await check_console(vm, ready["tty0"], tmp_path / "tty")
            counted = served.ask("stats", "devices")
            assert counted["rng0"]["io"]["given_bytes"] >= 64
            assert counted["disk0"]["io"]["flushes"] > 0
            assert counted["disk0"]["io"]["errors"] == 0
