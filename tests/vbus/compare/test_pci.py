"""Functions, slots and bus numbers."""

import pytest

from vbus.compare.pci import BarShape, Function, Kind, Topology
from vbus.compare.space import ExhaustedError
from vbus.errors import InvalidError


@pytest.mark.parametrize(
    ("kind", "size"), [(Kind.IO, 2), (Kind.IO, 48), (Kind.MEMORY, 8), (Kind.MEMORY, 0)]
)
def test_a_bar_is_a_power_of_two_and_not_too_small(kind: Kind, size: int) -> None:
    with pytest.raises(InvalidError, match="no BAR"):
        BarShape(kind, size)


def test_a_slot_is_taken_once() -> None:
    root = Topology().root
    root.put(Function("a"), 3)
    with pytest.raises(InvalidError, match="taken"):
        root.put(Function("b"), 3)
    root.put(Function("b"), 3, 1)
    with pytest.raises(InvalidError, match="no place"):
        root.put(Function("c"), 32)


def test_the_33rd_device_of_a_bus_has_no_slot() -> None:
    root = Topology().root
    for number in range(32):
        one = Function(f"f{number}")
        assert root.free_device(one) == number
        root.put(one, number)
    with pytest.raises(ExhaustedError, match="slots"):
        root.free_device(Function("more"))


def test_buses_are_numbered_depth_first() -> None:
    """As firmware does: the bus behind a bridge comes before the bridge's siblings."""
    topology = Topology()
    first = topology.bridge(topology.root, Function("b0"), 0)
    second = topology.bridge(topology.root, Function("b1"), 1)
    deep = topology.bridge(first, Function("b2"), 0)
    topology.number()
    assert [bus.number for bus in (topology.root, first, deep, second)] == [0, 1, 2, 3]
    assert [bus.subordinate for bus in (topology.root, first, deep)] == [3, 2, 2]


def test_bus_numbers_run_out_at_257() -> None:
    topology = Topology()
    bus = topology.root
    for number in range(255):
        bus = topology.bridge(bus, Function(f"b{number}"), 0)
    topology.number()
    topology.bridge(bus, Function("last"), 0)
    with pytest.raises(ExhaustedError, match="257 buses"):
        topology.number()
