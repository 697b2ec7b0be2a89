"""The rules of PCI, written down once more: what any laid-out layout must keep."""

from collections.abc import Iterable
from itertools import pairwise

from vbus.compare.firmware import IO_PORTS, Bar
from vbus.compare.layouts import Laid
from vbus.compare.pci import BUSES, Kind
from vbus.compare.space import Range

MIB = 1 << 20


def check(laid: Laid, memory_window: int = MIB) -> None:
    """Assert that every rule holds."""
    check_buses(laid)
    check_bars(laid)
    check_windows(laid, memory_window)
    check_vectors(laid)


def disjoint(ranges: Iterable[Range]) -> bool:
    ordered = sorted(ranges, key=lambda one: one.start)
    return all(low.end <= high.start for low, high in pairwise(ordered))


def inside(inner: Range, outer: Range) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def check_buses(laid: Laid) -> None:
    """Numbers are unique, and each bridge's range holds those behind it."""
    numbers = [bus.number for bus in laid.topology.buses]
    assert sorted(numbers) == list(range(len(numbers)))
    assert len(numbers) <= BUSES
    for bus in laid.topology.buses:
        assert all(0 <= d < 32 and 0 <= f < 8 for d, f in bus.slots)
        if bus.parent is not None:
            assert bus.parent.number < bus.number
            assert bus.subordinate <= bus.parent.subordinate


def check_bars(laid: Laid) -> None:
    """Each BAR of each function lies somewhere once, aligned to its size."""
    asked = sorted(
        (function.name, bar.kind, bar.size)
        for _, function in laid.topology.functions()
        for bar in function.bars
        if function.group or laid.layout.name != "segmented"
    )
    bars = laid.placement.bars
    assert asked == sorted((bar.function, bar.kind, bar.range.size) for bar in bars)
    for bar in bars:
        assert bar.range.start % bar.range.size == 0, bar
    for io in (True, False):
        same = [bar for bar in bars if (bar.kind is Kind.IO) == io]
        assert disjoint(bar.range for bar in same)
        for bar in same:
            assert in_a_space(laid, bar), bar


def in_a_space(laid: Laid, bar: Bar) -> bool:
    """It lies in ports or memory of the machine, and there in what was taken."""
    return any(
        (space.name == IO_PORTS) == (bar.kind is Kind.IO)
        and any(inside(bar.range, taken) for taken in space.taken)
        for space in laid.placement.spaces
    )


def check_windows(laid: Laid, memory_window: int) -> None:
    """Windows of a bridge hold what is in them and keep their granularity."""
    bridges = {b.bridge.name: b for b in laid.topology.buses if b.bridge is not None}
    for window in laid.placement.windows:
        bus = bridges[window.bridge]
        grain = bus.windows.io if window.kind is Kind.IO else memory_window
        assert grain is not None
        assert window.range.start % grain == 0
        assert window.range.size % grain == 0
        assert disjoint(window.inside)
        assert all(inside(one, window.range) for one in window.inside)
    for io in (True, False):
        top = [
            window.range
            for window in laid.placement.windows
            if (window.kind is Kind.IO) == io
            and bridges[window.bridge].parent is laid.topology.root
        ]
        assert disjoint(top)


def check_vectors(laid: Laid) -> None:
    """Each CPU gives a vector once, and no more than it has."""
    for space in laid.interrupts.spaces:
        assert disjoint(space.taken)
        assert all(one.start >= 0x21 and one.end <= 0xEC for one in space.taken)
