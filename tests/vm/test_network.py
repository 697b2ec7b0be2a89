"""Two virtual machines and a host-process guest on one switch, and the host beside."""

from collections.abc import Callable
from functools import partial

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import SIZE, here, process_guest, transfer
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import running, statistics, told
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

HOST = "10.87.4.1"
ADDRESSES = {"vm1": "10.87.4.11", "vm2": "10.87.4.12", "p3": "10.87.4.13"}
CONFIG = f"""
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "vbnet0"
address = "{HOST}/24"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "net-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name in ADDRESSES
)


async def in_vm(
    vm: VirtualMachine, function: Callable[..., str], *arguments: object
) -> str:
    result: str = await vm.python(function, *arguments)
    return result


async def bytes_per_frame(
    process: GuestProcess, name: str, since: int, size: int
) -> float:
    shown = await statistics(process)
    frames = shown["devices"][f"net-{name}"]["driver"]["frames"]["tx_frames"]
    return size / max(1, frames - since)


async def sent_frames(process: GuestProcess, name: str) -> int:
    shown = await statistics(process)
    frames: int = shown["devices"][f"net-{name}"]["driver"]["frames"]["tx_frames"]
    return frames


@isolated
async def test_bulk_tcp_is_whole_between_machines_processes_and_the_host(
    daemon: Daemon, boot: Boot
) -> None:
    """R15, R50, R61: every pair pings and moves 256 MB, in frames of up to 64 KiB."""
    # The isolated child ends its own daemon: the fixture ends nothing there.
    with daemon(CONFIG) as served:
        await every_pair(served, boot)


async def every_pair(served: Served, boot: Boot) -> None:
    async with (
        boot(served.socket("vm1")) as vm1,
        boot(served.socket("vm2"), iommu=None) as vm2,
        process_guest(served, "p3", f"net-p3={ADDRESSES['p3']}/24") as prefix,
        running(vm1, "--address", f"net-vm1={ADDRESSES['vm1']}/24") as first,
        running(vm2, "--address", f"net-vm2={ADDRESSES['vm2']}/24") as second,
    ):
        await told(first, name="net-vm1", state="running")
        await told(second, name="net-vm2", state="running")
        for address in (HOST, ADDRESSES["vm2"], ADDRESSES["p3"]):
            done = await vm1.run("ping", "-c", "3", "-W", "5", address)
            print(done.stdout.splitlines()[-1])
        at1, at2 = partial(in_vm, vm1), partial(in_vm, vm2)
        process = partial(here, prefix=prefix)
        before = await sent_frames(first, "vm1")
        await transfer(at1, here, HOST, "vm1 to host")
        mean = await bytes_per_frame(first, "vm1", before, SIZE)
        print(f"{mean:.0f} bytes a frame")
        assert mean > 20_000
        await transfer(here, at1, ADDRESSES["vm1"], "host to vm1")
        await transfer(at1, at2, ADDRESSES["vm2"], "vm1 to vm2")
        await transfer(at1, process, ADDRESSES["p3"], "vm1 to process")
        await transfer(process, at2, ADDRESSES["vm2"], "process to vm2")
