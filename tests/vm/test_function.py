"""The one function in a real guest, whatever is behind it (issue 3)."""

import re
from typing import Any

from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from vbus.control.client import ControlClient
from vbus.vm.machine import VirtualMachine

CONFIG = """
[[bus]]
name = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
"""
MANY = 1000
CONFIG_SPACE = 7


def devices(count: int) -> str:
    one = '[[device]]\nname = "echo{}"\nclass = "echo"\nbus = "bus0"\n'
    return "".join(one.format(number) for number in range(count))


def counted(daemon: Served) -> dict[str, Any]:
    """What the daemon says that the guest's function was asked so far."""
    found: dict[str, Any] = daemon.ask("stats", "guests/vm1/server")
    return found


async def check_function(vm: VirtualMachine) -> str:
    """See the ABI page's function, and give what lspci says of it."""
    rows = (await vm.run("lspci", "-n", "-d", "11da:")).stdout.splitlines()
    assert len(rows) == 1
    assert re.search(r"0680: 11da:2000 \(rev 02\)", rows[0])
    text = (await vm.run("lspci", "-vv", "-d", "11da:2000")).stdout
    assert re.search(r"Region 0: Memory at \w+ \(32-bit, non-prefetchable\)", text)
    assert re.search(r"Region 1: I/O ports at \w+ .*\[size=32\]", text)
    assert "Capabilities: [40] MSI: Enable- Count=1/1 Maskable- 64bit-" in text
    assert "MSI-X: Enable- Count=" in text
    assert "Interrupt: pin A" in text
    return text


async def test_the_function_is_the_same_for_0_10_and_1000_devices(
    daemon: Daemon, boot: Boot
) -> None:
    """R1, R10: hot-added devices change neither BARs, capabilities nor accesses."""
    served = daemon(CONFIG)
    async with (
        boot(served.socket("vm1")) as vm,
        ControlClient(served.runtime / "control.sock") as control,
    ):
        booted = counted(served)
        seen = [await check_function(vm)]
        for first, end in ((0, 10), (10, MANY)):
            before = counted(served)
            for number in range(first, end):
                await control.request(
                    "device.add",
                    name=f"echo{number}",
                    class_name="echo",
                    buses=["bus0"],
                    attributes={},
                )
            after = counted(served)
            assert after["messages"] == before["messages"]
            seen.append(await check_function(vm))
        report(booted, devices=0)
    assert seen[0] == seen[1] == seen[2]


async def test_a_boot_costs_the_same_accesses_for_0_and_1000_devices(
    daemon: Daemon, boot: Boot
) -> None:
    """R40: the configuration and region accesses of whole boots, counted."""
    costs = []
    for count in (0, MANY):
        served = daemon(CONFIG + devices(count))
        async with boot(served.socket("vm1")) as vm:
            costs.append(report(counted(served), devices=count))
            await check_function(vm)
    assert costs[0] == costs[1]
    reads, writes = costs[0]
    assert reads[CONFIG_SPACE] > 0
    assert writes[CONFIG_SPACE] > 0
    # Nobody but the bridge's driver touches what the BARs decode.
    assert not any(reads[:CONFIG_SPACE])


def report(count: dict[str, Any], *, devices: int) -> tuple[list[int], list[int]]:
    reads, writes = count["region_reads"], count["region_writes"]
    print(
        f"boot with {devices} devices: {reads[CONFIG_SPACE]} configuration reads, "
        f"{writes[CONFIG_SPACE]} writes; other regions {sum(reads[:CONFIG_SPACE])} "
        f"reads, {sum(writes[:CONFIG_SPACE])} writes; {count['dma_maps']} DMA maps, "
        f"{count['dma_unmaps']} unmaps; {count['irq_settings']} interrupt settings; "
        f"{count['messages']} messages"
    )
    return reads, writes
