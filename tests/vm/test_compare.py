"""The models of `vbus compare` against real machines: what is predicted is there.

The model lays a layout out; QEMU is given the same functions at the same places; the
guest's own view of BARs, windows and vectors must be the predicted one, to the byte.
"""

import dataclasses
import re
from typing import TypeVar

import pytest

from tests.vm.conftest import Boot, Daemon
from tests.vm.test_function import CONFIG, CONFIG_SPACE, devices
from vbus.compare.layouts import LAYOUTS, Laid, lay_out
from vbus.compare.pci import BarShape, Bus, Function, Kind
from vbus.compare.platforms import Q35, Platform
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
CASES = [
    (name, count)
    for name in ("virtio-modern", "virtio-transitional", "virtio-modern-ports")
    for count in (1, 8, 30)
] + [("virtio-transitional-ports", 1), ("virtio-transitional-ports", 8)]

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


def resources() -> dict[str, list[list[int]]]:
    """In the guest: the resources of each function, without what is empty."""
    from pathlib import Path

    found = {}
    for path in Path("/sys/bus/pci/devices").iterdir():
        lines = (path / "resource").read_text().split("\n")
        ranges = [
            [int(word, 16) for word in line.split()[:2]] for line in lines if line
        ]
        found[path.name] = [one for one in ranges if one[1]]
    return found


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


def seen(found: dict[str, list[list[int]]]) -> Ranges:
    places = seen_at(found)
    return {at: {(low, high) for low, high in ranges} for at, ranges in places.items()}


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


@pytest.mark.parametrize(("name", "count"), CASES)
async def test_what_the_model_predicts_is_what_a_guest_sees(
    boot: Boot, name: str, count: int
) -> None:
    """R20, R24, R31, R62: every BAR and window at its predicted address; the vectors
    that Linux's drivers took."""
    laid = lay_out(LAYOUTS[name], count, MACHINE)
    async with boot(
        iommu=None, extra=arguments(laid), words=("guest.modules=virtio_net",)
    ) as vm:
        assert not differences(predicted(laid), seen(await vm.python(resources)))
        taken = seen_at(await vm.python(vectors))
        members = {f.name: place(bus, f) for bus, f in laid.topology.functions()}
        got_each = {one.name: taken.get(members[one.name]) for one in laid.members}
        print(name, count, got_each)
        want = {one.name: next(iter(one.vectors), None) for one in laid.members}
        assert got_each == want
        assert laid.interrupts.vectors == sum(filter(None, want.values()))
        if name == "virtio-modern":
            tables = await check_ranges(vm, predicted(laid))
            assert all(
                tables[members[one.name]] >= 3
                for one in laid.members
                if one.name.startswith("virtio")
            )
        interrupts = (await vm.run("cat", "/proc/interrupts")).stdout
        assert len(re.findall(r"virtio\d+-(?:in|out)put\.\d", interrupts)) == 2 * count


@pytest.mark.parametrize("count", [1, 30])
async def test_the_bridges_prediction_is_what_a_guest_sees(
    daemon: Daemon, boot: Boot, count: int
) -> None:
    """R1, R10, R62: the same BARs at the same addresses, however many devices."""
    laid = lay_out(LAYOUTS["vbus-bridge"], count, MACHINE)
    served = daemon(CONFIG + devices(count))
    async with boot(served.socket("vm1"), iommu=None) as vm:
        assert not differences(predicted(laid), seen(await vm.python(resources)))


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
    totals = []
    for config, names in (
        (CONFIG + devices(8), ["vm1"]),
        (functions(8), [f"g{number}" for number in range(8)]),
    ):
        served = daemon(config)
        async with boot(*(served.socket(name) for name in names), iommu=None) as vm:
            found = [served.ask("stats", f"guests/{name}/server") for name in names]
            each = [
                one["region_reads"][CONFIG_SPACE] + one["region_writes"][CONFIG_SPACE]
                for one in found
            ]
            print(f"8 devices, {len(names)} functions: {sum(each)} accesses {each}")
            print(f"boot to the agent: {vm.boot_seconds:.2f} s")
            totals.append(each)
    [[one], eight] = totals
    # The one that Linux meets first is asked once more.
    assert all(one - each in (0, 1) for each in eight)
