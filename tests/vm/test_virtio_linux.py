"""Linux's own virtio drivers on functions of ours, one per device (issue 4)."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import here, receive, send
from tests.vm.conftest import Boot, Daemon, needed
from vbus.vm import image as images
from vbus.vm.image import GuestImage
from vbus.vm.machine import VirtualMachine

MB = 1 << 20
HOST, GUEST = "10.87.9.1", "10.87.9.2"
PORT = 5401
MODULES = "guest.modules=virtio_blk,virtio_net,virtio-rng,ext4"
FORCE_LEGACY, NO_MSI = "virtio_pci.force_legacy=1", "pci=nomsi"


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The guest with fio."""
    return needed(lambda: images.cached(packages=("fio",)))


def device(name: str, kind: str, layout: str, **attributes: object) -> str:
    """Configure an exposed device."""
    about = {"name": name, "class": kind, "expose": "pci", "layout": layout}
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in (about | attributes).items()
    ]
    return "\n".join(["[[device]]", *lines, ""])


def disk(folder: Path, layout: str, **attributes: object) -> str:
    about = {"path": str(folder / "disk"), "size": "64M", "serial": "vbus-0042"}
    return device("disk0", "virtio-blk", layout, **about | attributes)


def lan(layout: str) -> str:
    """A switch with a TAP of the host, and a network card with two queues on it."""
    tap = {"switch": "lan0", "ifname": "vbnet9", "address": f"{HOST}/24"}
    lines = [f'{key} = "{value}"' for key, value in tap.items()]
    switch = '[[device]]\nname = "lan0"\nclass = "switch"\n'
    uplink = ["[[device]]", 'name = "uplink0"', 'class = "switch-tap"', *lines, ""]
    return (
        switch
        + "\n".join(uplink)
        + device(
            "net0",
            "virtio-net",
            layout,
            switch="lan0",
            mac="02:00:00:00:09:02",
            pairs=2,
        )
    )


def function_of(served: Served, name: str) -> Path:
    return served.runtime / "functions" / f"{name}.sock"


def counted(served: Served, name: str) -> dict[str, Any]:
    """What the daemon counted for a device and its function."""
    device = served.ask("stats", f"devices/{name}")
    function = served.ask("stats", f"functions/{name}")
    return {**device, **function}


async def sh(vm: VirtualMachine, line: str, timeout_s: float = 60) -> str:
    """Run a line of shell in the guest."""
    return (await vm.run("sh", "-c", line, timeout_s=timeout_s)).stdout


async def driver_of(vm: VirtualMachine, address: str) -> str:
    """Name the driver of the virtio device that a function is."""
    path = f"/sys/bus/pci/devices/{address}/virtio*/driver"
    return (await sh(vm, f"basename $(readlink -f {path})")).strip()


async def addresses(vm: VirtualMachine) -> dict[str, str]:
    """Find the functions of ours: address by PCI id. QEMU's own has revision 0 and
    stands first."""
    rows = (await vm.run("lspci", "-Dn", "-d", "1af4:")).stdout.splitlines()[1:]
    return {row.split()[2]: row.split()[0] for row in rows}


# All four kinds


async def test_linux_binds_its_drivers_to_all_four_kinds(
    tmp_path: Path, daemon: Daemon, boot: Boot
) -> None:
    """R24: capabilities as lspci reads them, a vector for each queue, and traffic."""
    served = daemon(
        disk(tmp_path, "modern", queues=2)
        + '[[device]]\nname = "lan0"\nclass = "switch"\n'
        + device("net0", "virtio-net", "modern", switch="lan0")
        + device("con0", "virtio-console", "modern")
        + device("rng0", "virtio-rng", "modern")
    )
    names = ("disk0", "net0", "con0", "rng0")
    sockets = [function_of(served, name) for name in names]
    async with boot(*sockets, iommu=None, words=[MODULES]) as vm:
        found = await addresses(vm)
        drivers = {kind: await driver_of(vm, at) for kind, at in found.items()}
        assert drivers == {
            "1af4:1042": "virtio_blk",
            "1af4:1041": "virtio_net",
            "1af4:1043": "virtio_console",
            "1af4:1044": "virtio_rng",
        }
        text = (await vm.run("lspci", "-vv", "-s", found["1af4:1042"])).stdout
        print(text)
        check_capabilities(text)
        vectors = await sh(vm, "cat /proc/interrupts")
        for what in ("req.0", "req.1", "input.0", "output.0"):
            assert re.search(rf"PCI-MSIX.*-{re.escape(what)}\n", vectors), vectors
        await check_disk(vm, served)
        await check_entropy(vm)
        await vm.reboot()  # firmware and kernel find what a live driver left
        assert await driver_of(vm, found["1af4:1041"]) == "virtio_net"
        await check_entropy(vm)
        await sh(vm, "dd if=/dev/vda bs=1M count=8 iflag=direct of=/dev/null")
    for name in names:
        about = counted(served, name)
        assert about["device"]["broken"] is None
        assert about["function"]["ignored"] == 0
        print(name, {k: v for k, v in about["server"].items() if v})


def check_capabilities(text: str) -> None:
    """virtio 1.2, 4.1.4, decoded by a tool that is not ours."""
    assert "Virtio 1.0 block device (rev 01)" in text
    assert "MSI-X: Enable+ Count=3" in text or "MSI-X: Enable- Count=3" in text
    for name, offset, size in (
        ("CommonCfg", 0, 0x3C), ("ISR", 0x1000, 1), ("DeviceCfg", 0x2000, 0x3C),
    ):  # fmt: skip
        assert re.search(
            rf"VirtIO: {name}\s+BAR=4 offset={offset:08x} size={size:08x}\n", text
        ), name
    assert re.search(
        r"VirtIO: Notify\s+BAR=4 offset=00003000 size=00000008 multiplier=00000004",
        text,
    )
    assert "Kernel driver in use: virtio-pci" in text


async def check_disk(vm: VirtualMachine, served: Served) -> None:
    """Queues, serial number, and a disk that grows under Linux (R25)."""
    assert await sh(vm, "cat /sys/block/vda/serial") == "vbus-0042"
    assert (await sh(vm, "ls /sys/block/vda/mq")).split() == ["0", "1"]
    assert await sh(vm, "cat /sys/block/vda/size") == f"{64 * MB // 512}\n"
    assert served.vbus("device", "set", "disk0", "size=96M").returncode == 0
    grown = f"until [ $(cat /sys/block/vda/size) = {96 * MB // 512} ]; do :; done"
    await sh(vm, grown, timeout_s=10)


async def check_entropy(vm: VirtualMachine) -> None:
    """An entropy check on hwrng: it is ours, and its bytes are spread evenly."""
    current = await sh(vm, "cat /sys/class/misc/hw_random/rng_current")
    assert current.startswith("virtio_rng")
    chi_squared = await vm.python(spread, "/dev/hwrng", 64 << 10)
    print(f"chi squared of 64 KiB from /dev/hwrng: {chi_squared:.0f} (255 expected)")
    assert 140 < chi_squared < 400  # twelve standard deviations about apart


def spread(path: str, size: int) -> float:
    """In the guest: chi squared of the bytes' frequencies, 255 degrees of freedom."""
    from collections import Counter

    with open(path, "rb", buffering=0) as file:
        data = b""
        while len(data) < size:
            data += file.read(4096)
    expected = len(data) / 256
    count = Counter(data)
    return sum((count[n] - expected) ** 2 / expected for n in range(256))


# The disk


JOBS = {
    "--rw=randwrite --bs=4k --iodepth=1 --fsync=16": 3072,
    "--rw=randrw --bs=4k --iodepth=32 --fsync=16": 8192,
    "--rw=randwrite --bsrange=512-128k --iodepth=8 --fsync=16": 16384,
}
"""How fio is told to work, and on how many KiB."""
VERIFY = "--verify=crc32c --verify_fatal=1 --direct=1 --ioengine=libaio --thread"


async def check_fio(
    vm: VirtualMachine, node: str = "/dev/vda", *, part: int = 1
) -> None:
    """Random reads and writes at several depths, with fsync: no wrong byte.

    `part`: do the so-manieth part of it, on a slow disk.
    """
    for number, (job, kib) in enumerate(JOBS.items()):
        line = (
            f"fio --name=job{number} --filename={node} --offset={24 * number}M"
            f" {VERIFY} {job} --size={kib // part}K --output-format=json"
        )
        done = await vm.run("sh", "-c", line, check=False, timeout_s=60)
        assert done.status == 0, done.stdout + done.stderr
        (result,) = json.loads(done.stdout)["jobs"]
        assert result["error"] == 0
        assert result["read"]["total_ios"] > 0, done.stdout
        assert result["sync"]["total_ios"] > 0
        print(f"fio {job}: {result['write']['iops']:.0f} writes a second")


async def check_ext4(vm: VirtualMachine) -> None:
    """Made, filled, unmounted, clean; and whole when it is mounted again."""
    await sh(vm, "mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt")
    written = await vm.python(fill, "/mnt", 40)
    await sh(vm, "umount /mnt")
    print(await sh(vm, "e2fsck -fn /dev/vda"))
    await sh(vm, "echo 3 >/proc/sys/vm/drop_caches; mount -o ro /dev/vda /mnt")
    assert await vm.python(checksums, "/mnt") == written
    await sh(vm, "umount /mnt")


def fill(folder: str, count: int) -> dict[str, int]:
    """In the guest: files of all sizes, some of them removed again."""
    import os
    import zlib
    from pathlib import Path

    sums = {}
    for number in range(count):
        data = os.urandom(number * number * 700 + number)
        path = Path(folder) / f"file{number}"
        path.write_bytes(data)
        sums[path.name] = zlib.crc32(data)
    for number in range(0, count, 7):
        (Path(folder) / f"file{number}").unlink()
        del sums[f"file{number}"]
    os.sync()
    return sums


def checksums(folder: str) -> dict[str, int]:
    """In the guest: what is there now."""
    import zlib
    from pathlib import Path

    files = [path for path in Path(folder).iterdir() if path.is_file()]
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("modern", []),
        ("modern", [NO_MSI]),
        ("legacy", []),
        ("legacy-intx", []),
        ("transitional", [FORCE_LEGACY]),
    ],
)
async def test_a_disk_loses_no_byte_under_linux(
    tmp_path: Path, daemon: Daemon, boot: Boot, layout: str, words: list[str]
) -> None:
    """R20, R24: fio with verify, then a file system that is clean."""
    served = daemon(disk(tmp_path, layout))
    socket = function_of(served, "disk0")
    async with boot(socket, iommu=None, words=[MODULES, *words]) as vm:
        await check_fio(vm)
        await check_ext4(vm)
        about = counted(served, "disk0")
        wanted = "modern" if layout == "modern" else "legacy"
        assert about["function"]["mode"] == wanted
        assert about["io"]["errors"] == 0
        assert about["io"]["flushes"] > 20
        by_line = layout == "legacy-intx" or NO_MSI in words
        assert bool(about["function"]["lines"]) is by_line
        assert bool(about["function"]["messages"]) is not by_line
    # The host's own tool reads what the guest's kernel wrote.
    if e2fsck := shutil.which("e2fsck", path="/sbin:/usr/sbin"):
        await trio.run_process([e2fsck, "-fn", tmp_path / "disk"])


# The network


@pytest.mark.parametrize(
    ("layout", "words"),
    [("modern", []), ("legacy", []), ("transitional", [FORCE_LEGACY])],
)
@isolated
async def test_tcp_is_whole_and_fast_over_linux_virtio_net(
    daemon: Daemon, boot: Boot, layout: str, words: list[str]
) -> None:
    """R20, R24: iperf3 both ways, and 128 MB with checksums both ways."""
    # Here, as the test's process is not the one that ends what fixtures started.
    with daemon(lan(layout)) as served:
        await check_network(served, boot, layout, words)


async def check_network(
    served: Served, boot: Boot, layout: str, words: list[str]
) -> None:
    socket = function_of(served, "net0")
    async with boot(socket, iommu=None, words=[MODULES, *words]) as vm:
        await sh(vm, f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0")
        assert "02:00:00:00:09:02" in await sh(vm, "cat /sys/class/net/eth0/address")
        print((await vm.run("ping", "-c", "5", "-i", "0.2", HOST)).stdout)
        await check_transfers(vm)
        await check_iperf(vm)
        await check_queues(vm)
        if layout == "modern":
            await check_ring_reset(vm)
        about = counted(served, "net0")
        assert about["function"]["mode"] == (
            "modern" if not words and layout == "modern" else "legacy"
        )
        assert about["device"]["broken"] is None
        assert about["io"]["tx_errors"] == 0
        frame = about["io"]["tx_bytes"] / about["io"]["tx_frames"]
        print(f"{frame:.0f} bytes a frame from the guest")
        assert frame > 5_000, "segmentation is ours or the host's"


async def check_transfers(vm: VirtualMachine) -> None:
    sums: dict[str, str] = {}

    async def take_here() -> None:
        sums["out"] = await here(receive, PORT)

    async def take_there() -> None:
        sums["in"] = await vm.python(receive, PORT + 1)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_here)
            nursery.start_soon(take_there)
            sent = await vm.python(send, HOST, PORT, 128 * MB)
            brought = await here(send, GUEST, PORT + 1, 128 * MB)
    assert sums == {"out": sent, "in": brought}


async def check_iperf(vm: VirtualMachine) -> None:
    """The host serves, since the guest has no way to say that it listens."""
    for what, way in (("guest to host", []), ("host to guest", ["-R"])):
        async with listening() as port:
            words = ["-c", HOST, "-p", str(port), "-t", "2", "--json", *way]
            done = await vm.run("iperf3", *words, check=False)
        result = json.loads(done.stdout)
        assert "error" not in result, result
        total = result["end"]["sum_received"]["bits_per_second"]
        print(f"iperf3 {what}: {total / 1e9:.2f} Gbit/s")
        assert total > 50e6


@asynccontextmanager
async def listening() -> AsyncIterator[int]:
    """An iperf3 server of the host that is ready."""
    process = await trio.lowlevel.open_process(
        ["iperf3", "-s", "-1", "-p", "5201", "--forceflush"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        said = b""
        while b"listening" not in said:
            said += await process.stdout.receive_some()
        yield 5201
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


async def check_queues(vm: VirtualMachine) -> None:
    """MQ: Linux takes a second pair of queues; all are used, and only then."""
    for pairs in (1, 2):
        await vm.run("ethtool", "-L", "eth0", "combined", str(pairs))
        assert (await sh(vm, "ethtool -l eth0")).split()[-1] == str(pairs)
        before = await use_of_queues(vm)
        for way in ([], ["-R"]):
            async with listening() as port:
                words = ["-c", HOST, "-p", str(port), "-t", "1", "-P", "8", *way]
                await vm.run("iperf3", *words)
        after = await use_of_queues(vm)
        grown = {name: n - before.get(name, 0) for name, n in after.items()}
        print(f"{pairs} pairs: {grown}")
        used = {name for name, count in grown.items() if count}
        assert used == {f"{way}{n}" for way in ("rx", "tx") for n in range(pairs)}


async def use_of_queues(vm: VirtualMachine) -> dict[str, int]:
    """Interrupts of each receive queue, and kicks of each transmit queue."""
    counters = await sh(vm, "ethtool -S eth0")
    rows = re.findall(r"\b(tx\d)_kicks: (\d+)", counters)
    found = {name: int(count) for name, count in rows}
    for line in (await sh(vm, "cat /proc/interrupts")).splitlines():
        if queue := re.search(r"-input\.(\d)$", line):
            found[f"rx{queue[1]}"] = sum(map(int, line.split()[1:3]))
    return found


async def check_ring_reset(vm: VirtualMachine) -> None:
    """RING_RESET: Linux resizes rings of a device that is up (2.6.1)."""
    await vm.run("ethtool", "-G", "eth0", "rx", "128", "tx", "64")
    assert re.search(r"Current.*RX:\s+128", await sh(vm, "ethtool -g eth0"), re.S)
    print((await vm.run("ping", "-c", "3", "-i", "0.2", HOST)).stdout)


# The console


async def test_a_getty_runs_on_the_console(daemon: Daemon, boot: Boot) -> None:
    """A terminal of the host is a shell of the guest."""
    served = daemon(device("con0", "virtio-console", "modern"))
    (place,) = served.ask("stats", "devices/con0")["places"]
    async with boot(function_of(served, "con0"), iommu=None) as vm:
        getty = await vm.start("getty", "-n", "-l", "/bin/sh", "0", "hvc0", "vt100")
        async with terminal(place.removeprefix("pty:")) as (say, hear):
            await hear("# ")
            await say("echo $((6*7))-$(tty)\n")
            await hear("42-/dev/hvc0")
            await say("stty size; exit\n")
            await hear("25 80")
        await getty.wait()


@asynccontextmanager
async def terminal(path: str) -> AsyncIterator[tuple[Any, Any]]:
    """Open a terminal of the host: what says, and what waits until it hears."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    heard = ""

    async def say(text: str) -> None:
        rest = text.encode()
        while rest:
            await trio.lowlevel.wait_writable(fd)
            rest = rest[os.write(fd, rest) :]

    async def hear(wanted: str) -> None:
        nonlocal heard
        with trio.move_on_after(20):
            while wanted not in heard:
                await trio.lowlevel.wait_readable(fd)
                heard += os.read(fd, 4096).decode(errors="replace")
        assert wanted in heard, heard

    try:
        yield say, hear
    finally:
        os.close(fd)


# Life and death


async def test_a_removed_device_leaves_the_machine_and_its_other_devices(
    tmp_path: Path, daemon: Daemon, boot: Boot
) -> None:
    """R60: the function goes in the middle of traffic; the disk beside it goes on."""
    served = daemon(disk(tmp_path, "modern") + device("rng0", "virtio-rng", "modern"))
    sockets = [function_of(served, "disk0"), function_of(served, "rng0")]
    async with boot(*sockets, iommu=None, words=[MODULES]) as vm:
        await vm.start("sh", "-c", "cat /dev/hwrng >/dev/null")
        assert served.vbus("device", "del", "rng0").returncode == 0
        await sh(vm, "dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct")
        assert await sh(vm, "dd if=/dev/vda bs=1M count=8 | md5sum") == await sh(
            vm, "dd if=/dev/vda bs=1M count=8 iflag=direct | md5sum"
        )
    assert [one["name"] for one in served.ask("device", "show")] == ["disk0"]


async def test_a_disk_works_behind_an_iommu(
    tmp_path: Path, daemon: Daemon, boot: Boot
) -> None:
    """ACCESS_PLATFORM: Linux gives the addresses that the IOMMU translates."""
    served = daemon(disk(tmp_path, "modern"))
    async with boot(function_of(served, "disk0"), words=[MODULES]) as vm:
        assert "DMAR" in await sh(vm, "dmesg | grep -i 'iommu enabled'")
        line = (
            f"fio --name=v --filename=/dev/vda {VERIFY} --rw=randwrite --bs=4k"
            " --iodepth=4 --size=1M --fsync=64"
        )
        await sh(vm, line)
        maps = counted(served, "disk0")["server"]["dma_maps"]
        print(f"{maps} DMA maps")
        assert maps > 256
