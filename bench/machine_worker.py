"""Boots a machine with both kinds of network and measures them: `machine.py`."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from bench.daemon import Daemon
from bench.lab import Place, ip
from bench.processes import report
from vbus.vm import image, qemu
from vbus.vm.machine import VirtualMachine, boot

_NETS = {"vbus": "10.78.1", "qemu": "10.78.2"}
_SECONDS = 3
_PINGS = 50
_READY_S = 30
_CONFIG = f"""
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "host0"
address = "{_NETS["vbus"]}.1/24"
[[device]]
name = "venet0"
class = "venet"
bus = "bus0"
switch = "lan0"
[[guest]]
name = "vm1"
bus = "bus0"
"""
_TAP = "host1"
_VIRTIO_NET = [
    *("-netdev", f"tap,id=net0,ifname={_TAP},script=no,downscript=no,vhost=off"),
    *("-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01,romfile="),
]


@asynccontextmanager
async def _venet(vm: VirtualMachine) -> AsyncIterator[None]:
    """The driver in the guest, until its interface is up."""
    address = f"venet0={_NETS['vbus']}.2/24"
    process = await vm.start("vbus", "guest", "run", "--json", "--address", address)
    try:
        with trio.fail_after(_READY_S):
            async for line in process:
                if json.loads(line).get("state") == "running":
                    break
        yield
    finally:
        process.end()


async def _virtio_net(vm: VirtualMachine) -> None:
    """Give QEMU's own card its address."""
    await vm.run("modprobe", "virtio_net")
    mac = "52:54:00:00:00:01"
    find = f"grep -l {mac} /sys/class/net/*/address | cut -d/ -f5"
    name = (await vm.run("sh", "-c", find)).stdout.strip()
    await vm.run("ip", "addr", "add", f"{_NETS['qemu']}.2/24", "dev", name)
    await vm.run("ip", "link", "set", name, "up")


async def _tcp(vm: VirtualMachine, host: str, *options: str) -> float:
    command = ["iperf3", "-c", host, "-t", str(_SECONDS), "-J", *options]
    said = json.loads((await vm.run(*command)).stdout)
    received: float = said["end"]["sum_received"]["bits_per_second"]
    return received / 1e9


async def _ping(vm: VirtualMachine, host: str) -> float:
    said = (await vm.run("ping", "-c", str(_PINGS), "-i", "0.02", host)).stdout
    found = re.search(r"min/avg/max = [\d.]+/([\d.]+)/", said)
    assert found is not None, said
    return float(found[1]) * 1000


async def _measure(vm: VirtualMachine) -> dict[str, float]:
    result = {"boot": vm.boot_seconds}
    for kind, net in _NETS.items():
        host = f"{net}.1"
        await _ping(vm, host)
        result[f"{kind}_ping"] = await _ping(vm, host)
        result[f"{kind}_out"] = await _tcp(vm, host)
        result[f"{kind}_in"] = await _tcp(vm, host, "-R")
    return result


async def _serve_iperf(nursery: trio.Nursery) -> None:
    """The host's end, on all its addresses."""
    server = partial(trio.run_process, ["iperf3", "-s"], capture_stdout=True)
    await nursery.start(server)


async def main() -> None:
    emulator, guest = qemu.find(), image.cached()
    Place.hub()
    with Daemon(_CONFIG) as daemon:
        ip(f"tuntap add dev {_TAP} mode tap vnet_hdr")
        ip(f"addr add {_NETS['qemu']}.1/24 dev {_TAP}")
        ip(f"link set {_TAP} up")
        async with (
            trio.open_nursery() as nursery,
            boot(
                guest, [daemon.socket("vm1")], extra=_VIRTIO_NET, emulator=emulator
            ) as vm,
            _venet(vm),
        ):
            await _serve_iperf(nursery)
            await _virtio_net(vm)
            result = await _measure(vm)
            nursery.cancel_scope.cancel()
    report(result)


if __name__ == "__main__":
    trio.run(main)
