"""The models of `vbus compare` against real machines: what is predicted is there.

The model lays a layout out; QEMU is given the same functions at the same places; the
guest's own view of BARs, windows and vectors must be the predicted one, to the byte.
"""

import dataclasses
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import trio

from backends.virtio.pci import function as shown_as
from backends.virtio.rng import VirtioRng
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_function import CONFIG, CONFIG_SPACE, devices
from tests.vm.test_virtio_linux import device, function_of
from vbus.compare.layouts import LAYOUTS, Laid, Layout, lay_out
from vbus.compare.layouts.conventional import Conventional
from vbus.compare.pci import BarShape, Bus, Function, Kind
from vbus.compare.platforms import Q35, Platform
from vbus.vm.arguments import bridge_device
from vbus.vm.machine import VirtualMachine

# The channel to the test's agent: a transitional virtio function in slot 1.
AGENT = (
    BarShape(Kind.IO, 64),
    BarShape(Kind.MEMORY, 4096),
    BarShape(Kind.PREFETCHABLE, 16384, wide=True),
)
MACHINE: Platform = dataclasses.replace(
    Q35, fixed=((0x01, 0, "agent", AGENT), *Q35.fixed)
)
NET = "virtio-net-pci,romfile=,disable-legacy={}"
COUNTS = (1, 8, 30)
DRIVEN = {
    "virtio-modern": COUNTS,
    "virtio-transitional": COUNTS,
    "virtio-modern-ports": COUNTS,
    "virtio-transitional-ports": (1, 8),
}
# Proposals that only our own server builds; no driver binds to them.
PROPOSED = {
    "four-bar": COUNTS,
    "mirrored": (30,),
    "offsets": (30,),
    "offsets-table": (30,),
}
AT_ONCE = 2
"""Machines that boot at the same time: a boot keeps one CPU busy."""
BOOT_S = 120

# SeaBIOS gives the SMBus ports like any other function, then moves it to these.
SMBUS, SMBUS_PORTS = (0, 0x1F, 3), {(0x700, 0x73F)}
# Linux lists the ports for power management as the LPC function's; they are no BAR.
LPC, PM_PORTS = (0, 0x1F, 0), {(0x600, 0x67F)}

ADDRESS = r"0000:\w\w:\w\w\.\d"
REGION = re.compile(
    r"Region \d: (Memory|I/O ports) at (\w+).*\[size=(\w+)\]",
)
WINDOW = re.compile(r"(?:I/O|emory) behind bridge: (\w+)-(\w+) (?!.*\[disabled\])")

T = TypeVar("T")
Place = tuple[int, int, int]
"""Bus, slot, function."""
Ranges = dict[Place, set[tuple[int, int]]]
"""First and last address of what each function has."""


def arguments(laid: Laid) -> list[str]:
    """Give QEMU the functions of a layout, each at its place."""
    legacy = "off" if "transitional" in laid.layout.name else "on"
    below = {bus: f"b{number}" for number, bus in enumerate(laid.topology.buses)}
    found = []
    for bus, function in laid.topology.functions():
        if not function.group:
            continue
        where = place(bus, function)
        about = f"bus={'pcie.0' if bus.parent is None else below[bus]},addr="
        about += f"{where[1]:x}.{where[2]}"
        if function.below is None:
            about = f"{NET.format(legacy)},{about}"
        elif function.below.express:
            about = (
                f"pcie-root-port,id={below[function.below]},multifunction=on,"
                f"chassis={function.below.number},slot={function.below.number},{about}"
            )
        else:
            about = f"i82801b11-bridge,id={below[function.below]},{about}"
        found += ["-device", about]
    return found


def place(bus: Bus, function: Function) -> Place:
    return bus.number, *function.address


def predicted(laid: Laid) -> Ranges:
    """Give each function's BARs and windows, as first and last address."""
    places = {f.name: place(bus, f) for bus, f in laid.topology.functions()}
    found: Ranges = {at: set() for at in places.values()}
    for bar in laid.placement.bars:
        found[places[bar.function]].add((bar.range.start, bar.range.end - 1))
    for window in laid.placement.windows:
        found[places[window.bridge]].add((window.range.start, window.range.end - 1))
    return {**found, SMBUS: SMBUS_PORTS}


def vectors() -> dict[str, int]:
    """In the guest: MSI and MSI-X vectors of each function that has any."""
    from pathlib import Path

    paths = Path("/sys/bus/pci/devices").glob("*/msi_irqs")
    return {path.parent.name: len(list(path.iterdir())) for path in paths}


def seen_at(found: dict[str, T]) -> dict[Place, T]:
    """Put places in place of Linux's names."""
    return {
        (int(name[5:7], 16), int(name[8:10], 16), int(name[11])): value
        for name, value in found.items()
    }


def by_lspci(text: str) -> tuple[Ranges, dict[int, Place], dict[Place, int]]:
    """Read `lspci -D -vv`: BARs and windows, bridges by the bus behind them, and how
    many MSI-X vectors each function has."""
    found: Ranges = {}
    bridges: dict[int, Place] = {}
    tables: dict[Place, int] = {}
    for block in filter(None, re.split(r"\n\n+", text)):
        [at] = seen_at({block.split()[0]: None})
        ranges = found.setdefault(at, set())
        for kind, start, size in REGION.findall(block):
            ranges.add(sized(int(start, 16), size))
            assert kind in ("Memory", "I/O ports")
        for low, high in WINDOW.findall(block):
            ranges.add((int(low, 16), int(high, 16)))
        if behind := re.search(r"secondary=([0-9a-f]{2})", block):
            bridges[int(behind[1], 16)] = at
        if table := re.search(r"MSI-X: Enable. Count=(\d+)", block):
            tables[at] = int(table[1])
    return found, bridges, tables


def sized(start: int, size: str) -> tuple[int, int]:
    """Take lspci's size: 64, 4K, 2M."""
    shift = {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return start, start + (int(size.rstrip("KMG")) << shift) - 1


def by_proc(text: str, bridges: dict[int, Place]) -> Ranges:
    """Read /proc/iomem or /proc/ioports: what is a function's, what is a bridge's."""
    found: Ranges = {}
    for low, high, owner in re.findall(r"^ *(\w+)-(\w+) : (.*)$", text, re.M):
        if re.fullmatch(ADDRESS, owner):
            [at] = seen_at({owner: None})
        elif (bus := re.fullmatch(r"PCI Bus 0000:(\w+)", owner)) and bus[1] != "00":
            at = bridges[int(bus[1], 16)]
        else:
            continue
        found.setdefault(at, set()).add((int(low, 16), int(high, 16)))
    return found


async def check_ranges(vm: VirtualMachine, want: Ranges) -> dict[Place, int]:
    """Hold lspci's text and the kernel's own lists against what was predicted; give
    the size of each function's MSI-X table."""
    text = (await vm.run("lspci", "-D", "-vv")).stdout
    ranges, bridges, tables = by_lspci(text)
    assert not differences(want, ranges), text
    listed: Ranges = {at: set() for at in want}
    for name in ("iomem", "ioports"):
        for at, few in by_proc(
            (await vm.run("cat", f"/proc/{name}")).stdout, bridges
        ).items():
            listed[at] = listed.get(at, set()) | few
    assert not differences({**want, LPC: PM_PORTS}, listed)
    return tables


def differences(want: Ranges, got: Ranges) -> str:
    """Say in hex where they differ; nothing if they do not."""
    return "\n".join(
        f"{at}: predicted {shown(want.get(at))}, seen {shown(got.get(at))}"
        for at in sorted(want.keys() | got.keys())
        if want.get(at) != got.get(at)
    )


def shown(ranges: set[tuple[int, int]] | None) -> list[str]:
    return [f"{low:x}-{high:x}" for low, high in sorted(ranges or ())]


async def with_each(
    counts: tuple[int, ...], check: Callable[[int], Awaitable[None]]
) -> None:
    """Check every number of devices, a few machines at a time."""
    limit = trio.CapacityLimiter(AT_ONCE)

    async def one(count: int) -> None:
        async with limit:
            await check(count)

    async with trio.open_nursery() as nursery:
        for count in counts:
            nursery.start_soon(one, count)


@pytest.mark.parametrize("name", DRIVEN)
async def test_what_the_model_predicts_is_what_a_guest_sees(
    boot: Boot, name: str
) -> None:
    """R20, R24, R31, R62: every BAR and window at its predicted address; the vectors
    that Linux's drivers took."""

    async def check(count: int) -> None:
        laid = lay_out(LAYOUTS[name], count, MACHINE)
        async with boot(
            iommu=None,
            extra=arguments(laid),
            words=("guest.modules=virtio_net",),
            timeout_s=BOOT_S,
        ) as vm:
            await check_driven(vm, laid)

    await with_each(DRIVEN[name], check)


async def check_driven(vm: VirtualMachine, laid: Laid) -> None:
    """Hold a machine whose functions have Linux's drivers against the model."""
    tables = await check_ranges(vm, predicted(laid))
    taken = seen_at(await vm.python(vectors))
    members = {f.name: place(bus, f) for bus, f in laid.topology.functions()}
    got = {one.name: taken.get(members[one.name]) for one in laid.members}
    want = {one.name: next(iter(one.vectors), None) for one in laid.members}
    assert got == want
    assert laid.interrupts.vectors == sum(filter(None, want.values()))
    sizes = {one.name: tables.get(members[one.name], 0) for one in laid.members}
    assert all(sizes[name] >= (count or 0) for name, count in want.items())
    text = (await vm.run("cat", "/proc/interrupts")).stdout
    queues = len(re.findall(r"virtio\d+-(?:in|out)put\.\d", text))
    assert queues == 2 * laid.devices


async def test_the_bridges_prediction_is_what_a_guest_sees(
    daemon: Daemon, boot: Boot
) -> None:
    """R1, R10, R62: the same BARs at the same addresses, however many devices."""

    async def check(count: int) -> None:
        laid = lay_out(LAYOUTS["vbus-bridge"], count, MACHINE)
        socket = daemon(CONFIG + devices(count)).socket("vm1")
        async with boot(socket, iommu=None, timeout_s=BOOT_S) as vm:
            tables = await check_ranges(vm, predicted(laid))
            [one] = laid.members
            [at] = [place(bus, f) for bus, f in laid.topology.functions() if f is one]
            assert tables[at] == one.vectors[0]

    await with_each(COUNTS, check)


@pytest.mark.parametrize("name", PROPOSED)
async def test_the_proposals_of_2012_lie_where_they_are_predicted(
    daemon: Daemon, boot: Boot, name: str
) -> None:
    """R21, R22, R23, R62: the register layouts that no driver knows. The model lays
    out the BARs that our server shows, whose ports are 256 and not the least."""

    async def check(count: int) -> None:
        laid = lay_out(as_served(name), count, MACHINE)
        served = daemon(
            '[[device]]\nname = "lan0"\nclass = "switch"\n'
            + "".join(
                device(f"net{number}", "virtio-net", name, switch="lan0")
                for number in range(count)
            )
        )
        extra = exposed(laid, served)
        async with boot(iommu=None, extra=extra, timeout_s=BOOT_S) as vm:
            tables = await check_ranges(vm, predicted(laid))
            members = [f for f in laid.members if f.vectors]
            places = {f.name: place(bus, f) for bus, f in laid.topology.functions()}
            assert len(members) == count
            assert all(tables[places[f.name]] >= f.vectors[0] for f in members)

    await with_each(PROPOSED[name], check)


def as_served(layout: str) -> Layout:
    """Give a layout in conventional slots, of the BARs that our server shows."""
    shown = shown_as(VirtioRng(), layout)
    shapes = tuple(
        BarShape(Kind.IO if bar.io else Kind.MEMORY, bar.size)
        for _, bar in sorted(shown.config.bars.items())
    )
    shown.close()

    class Served(Conventional):
        name = layout
        bars = shapes

    return Served()


def exposed(laid: Laid, served: Served) -> list[str]:
    """Give QEMU our functions, each at its place, and the bridges to them."""
    below = {bus: f"b{number}" for number, bus in enumerate(laid.topology.buses)}
    found, number = [], 0
    for bus, function in laid.topology.functions():
        if not function.group:
            continue
        _, slot, index = place(bus, function)
        above = "pcie.0" if bus.parent is None else below[bus]
        at = f"{slot:x}.{index}"
        if function.below is not None:
            about = f"id={below[function.below]},bus={above},addr={at}"
            found += ["-device", f"i82801b11-bridge,{about}"]
            continue
        socket, name = function_of(served, f"net{number}"), f"n{number}"
        found += bridge_device(socket, name, bus=above, addr=at)
        number += 1
    return found


def functions(count: int) -> str:
    """Configure so many guests, each with one device on a bus of its own."""
    one = (
        '[[bus]]\nname = "b{0}"\n[[guest]]\nname = "g{0}"\nbus = "b{0}"\n'
        '[[device]]\nname = "e{0}"\nclass = "echo"\nbus = "b{0}"\n'
    )
    return "".join(one.format(number) for number in range(count))


async def test_a_boot_costs_as_many_accesses_as_there_are_functions(
    daemon: Daemon, boot: Boot
) -> None:
    """R40, R41, R62: eight devices behind eight functions and behind one, the same
    machine; configuration accesses of the whole boot, counted by the server."""
    totals: dict[int, list[int]] = {}

    async def check(count: int) -> None:
        names = [f"g{number}" for number in range(count)] if count > 1 else ["vm1"]
        served = daemon(functions(count) if count > 1 else CONFIG + devices(8))
        sockets = [served.socket(name) for name in names]
        async with boot(*sockets, iommu=None, timeout_s=BOOT_S):
            found = [served.ask("stats", f"guests/{name}/server") for name in names]
            totals[count] = [
                one["region_reads"][CONFIG_SPACE] + one["region_writes"][CONFIG_SPACE]
                for one in found
            ]
            print(f"8 devices, {count} functions: {sum(totals[count])} accesses")

    await with_each((1, 8), check)
    [one] = totals[1]
    # The one that Linux meets first is asked once more.
    assert all(one - each in (0, 1) for each in totals[8])
