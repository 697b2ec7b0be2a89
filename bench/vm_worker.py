"""Linux in a virtual machine on disks and network cards of different makers.

Prints one JSON object: fio's requests a second and iperf3's bits a second, for a
function of ours, for QEMU's own device, and for vhost-user-blk of qemu-storage-daemon,
all in the same machine. Runs in namespaces of its own (`lab.enter`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import trio

from bench.daemon import Daemon
from bench.lab import ip
from bench.processes import report
from vbus.vm import cache, image
from vbus.vm.debian import Apt, program, unpack
from vbus.vm.machine import VirtualMachine, boot

MIB = 1 << 20
DISK_MIB = 64
SECONDS = 2
JOBS = {
    f"{rw}{depth}": f"--rw={rw} --iodepth={depth}"
    for rw in ("randread", "randwrite")
    for depth in (1, 32)
}
_FIO = (
    "fio --name=j --filename={} --bs=4k --direct=1 --ioengine=libaio --thread"
    f" --time_based --runtime={SECONDS} --ramp_time=0.5 --output-format=json {{}}"
)
PLACES = {"qemu": "10", "vhost": "11"}
"""PCI slots of the others' disks and cards; ours comes where there is room."""
NET_PLACE = "12"
HOSTS = {"vbus": "10.78.1.1", "qemu": "10.78.2.1"}


def storage_daemon() -> list[str]:
    """Give the words that start qemu-storage-daemon, fetched if it is not there."""
    found = shutil.which("qemu-storage-daemon")
    if found:
        return [found]

    def make(fresh: Path) -> None:
        apt = Apt(fresh / "apt", ("trixie", "trixie-backports"))
        unpack(apt.download("qemu-utils"), fresh)
        shutil.rmtree(fresh / "apt")

    folder = cache.folder("qemu-utils-trixie-backports", make)
    return program(folder, "qemu-storage-daemon")


def made(folder: Path, name: str) -> Path:
    """Make a disk that the page cache has, without holes."""
    path = folder / name
    path.write_bytes(os.urandom(DISK_MIB * MIB))
    return path


@contextmanager
def vhost_disk(folder: Path) -> Iterator[list[str]]:
    """Export a disk by vhost-user-blk; give QEMU's options for it."""
    path, sock = made(folder, "vhost"), folder / "vhost.sock"
    blockdev = f"driver=file,node-name=f0,filename={path}"
    export = f"type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={sock}"
    words = [*storage_daemon(), "--blockdev", blockdev]
    words += ["--export", f"{export},writable=on,num-queues=1"]
    process = subprocess.Popen(words)
    try:
        while not sock.exists():
            if process.poll() is not None:
                raise RuntimeError("qemu-storage-daemon does not run")
            time.sleep(0.01)
        yield [
            *("-chardev", f"socket,id=c0,path={sock}"),
            "-device",
            f"vhost-user-blk-pci,chardev=c0,num-queues=1,addr=0x{PLACES['vhost']}",
        ]
    finally:
        process.kill()
        process.wait()


def own_disk(folder: Path) -> list[str]:
    """Give the options for QEMU's own disk."""
    path = made(folder, "qemu")
    return [
        *("-blockdev", f"driver=file,node-name=q0,filename={path}"),
        *("-device", f"virtio-blk-pci,drive=q0,addr=0x{PLACES['qemu']}"),
    ]


def own_card() -> list[str]:
    """Give the options for QEMU's own card, on a TAP that is here."""
    ip("tuntap add qtap0 mode tap vnet_hdr")
    ip(f"addr add {HOSTS['qemu']}/24 dev qtap0")
    ip("link set qtap0 up")
    return [
        *("-netdev", "tap,id=n0,ifname=qtap0,script=no,downscript=no,vnet_hdr=on"),
        *("-device", f"virtio-net-pci,netdev=n0,addr=0x{NET_PLACE}"),
    ]


def config(folder: Path) -> str:
    """Configure our disk and our card."""
    return f"""
[[device]]
name = "disk0"
class = "virtio-blk"
expose = "pci"
path = "{made(folder, "vbus")}"
serial = "vbus"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "vtap0"
address = "{HOSTS["vbus"]}/24"
[[device]]
name = "net0"
class = "virtio-net"
expose = "pci"
switch = "lan0"
mac = "02:00:00:00:78:02"
"""


async def disks(vm: VirtualMachine) -> dict[str, str]:
    """Find each maker's disk."""
    found = {}
    for maker, slot in PLACES.items():
        line = f"ls /sys/bus/pci/devices/0000:00:{slot}.0/virtio*/block"
        found[maker] = (await vm.run("sh", "-c", line)).stdout.strip()
    line = "grep -l ^vbus /sys/block/vd*/serial"
    found["vbus"] = (await vm.run("sh", "-c", line)).stdout.split("/")[3]
    return found


async def fio(vm: VirtualMachine, disk: str, job: str) -> float:
    """Requests a second."""
    line = _FIO.format(f"/dev/{disk}", JOBS[job])
    done = await vm.run("sh", "-c", line)
    (result,) = json.loads(done.stdout)["jobs"]
    return float(result["read"]["iops"] + result["write"]["iops"])


async def cards(vm: VirtualMachine) -> None:
    """Give both cards their addresses."""
    for maker, host in HOSTS.items():
        if maker == "vbus":
            line = "dirname $(grep -l 02:00:00:00:78:02 /sys/class/net/*/address)"
            name = (await vm.run("sh", "-c", line)).stdout.strip().split("/")[-1]
        else:
            line = f"ls /sys/bus/pci/devices/0000:00:{NET_PLACE}.0/virtio*/net"
            name = (await vm.run("sh", "-c", line)).stdout.strip()
        guest = host[:-1] + "2"
        await vm.run(
            "sh", "-c", f"ip addr add {guest}/24 dev {name}; ip link set {name} up"
        )


async def iperf(vm: VirtualMachine, host: str, *way: str) -> float:
    """Gbit a second, between the guest and a server here."""
    process = await trio.lowlevel.open_process(
        ["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        while b"listening" not in await process.stdout.receive_some():
            pass
        words = ["iperf3", "-c", host, "-t", str(SECONDS), "--json", *way]
        done = await vm.run(*words)
        total = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]
        return float(total) / 1e9
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


@asynccontextmanager
async def machine(folder: Path, stack: ExitStack) -> AsyncIterator[VirtualMachine]:
    """A machine with everybody's devices."""
    daemon = stack.enter_context(Daemon(config(folder)))
    sockets = [daemon.function(name) for name in ("disk0", "net0")]
    extra = [*own_disk(folder), *stack.enter_context(vhost_disk(folder)), *own_card()]
    words = ["guest.modules=virtio_blk,virtio_net"]
    guest = image.cached(packages=("fio",))
    async with boot(guest, sockets, iommu=None, extra=extra, words=words) as vm:
        yield vm


async def measure(what: str) -> dict[str, float]:
    """Everything of one kind: "disk" or "net"."""
    result = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        async with machine(folder, stack) as vm:
            if what == "disk":
                found = await disks(vm)
                for job in JOBS:
                    for maker, disk in found.items():
                        result[f"{maker}_{job}"] = await fio(vm, disk, job)
            else:
                await cards(vm)
                for maker, host in HOSTS.items():
                    result[f"{maker}_out"] = await iperf(vm, host)
                    result[f"{maker}_in"] = await iperf(vm, host, "-R")
    return result


if __name__ == "__main__":
    report(trio.run(measure, sys.argv[1]))
