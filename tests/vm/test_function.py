"""The one function in a real guest, whatever is behind it (issue 3)."""

import re
from typing import Any

from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from vbus import abi
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


IDENTITY = f"{abi.VENDOR_ID:04x}:{abi.DEVICE_ID:04x}"
# The whole of what `lspci -vv` shows before a driver comes (ABI 1, docs/abi.md): each
# BAR with its kind and size, two capabilities, and no third one.
SHOWN = [
    rf"Bridge \[0680\]: .* \[{IDENTITY}\] \(rev 02\)",
    r"Subsystem: .* \[1af4:1100\]",
    r"Control: I/O. Mem. BusMaster- .* DisINTx-",
    r"Status: Cap\+ .* INTx-",
    r"Interrupt: pin A routed to IRQ \d+",
    r"Region 0: Memory at \w+ \(32-bit, non-prefetchable\)( \[disabled\])? \[size=64\]",
    r"Region 1: I/O ports at \w+( \[disabled\])? \[size=32\]",
    r"Region 2: Memory at \w+ \(32-bit, non-prefetchable\)( \[disabled\])? \[size=4K\]",
    r"Capabilities: \[40\] MSI: Enable- Count=1/1 Maskable- 64bit-",
    r"Address: 00000000  Data: 0000",
    r"Capabilities: \[50\] MSI-X: Enable- Count=8 Masked-",
    r"Vector table: BAR=2 offset=00000000",
    r"PBA: BAR=2 offset=00000800",
]
MAY_BE = r"(IOMMU group|Latency|Kernel driver|Kernel modules|DeviceName|Physical Slot)"


async def check_function(vm: VirtualMachine) -> str:
    """See the ABI page's function alone, and give what lspci says of it."""
    rows = (await vm.run("lspci", "-n")).stdout.splitlines()
    ours = [row for row in rows if f" {abi.VENDOR_ID:04x}:" in row]
    assert len(ours) == 1, rows
    # One function, and no bridge or slot that was made for more.
    assert ours[0].split()[0].endswith(".0")
    assert "multifunction" not in (await header(vm, ours[0].split()[0]))
    text = (await vm.run("lspci", "-vvnn", "-d", IDENTITY)).stdout
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if not re.match(MAY_BE, line)]
    assert len(found) == len(SHOWN), text
    for line, pattern in zip(found, SHOWN, strict=True):
        assert re.search(f"{pattern}$", line), (line, pattern)
    return text


async def header(vm: VirtualMachine, address: str) -> str:
    """Give "single" or "multifunction", by the header type register."""
    kind = (await vm.run("setpci", "-s", address, "HEADER_TYPE")).stdout.strip()
    return "multifunction" if int(kind, 16) & 0x80 else "single"


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
