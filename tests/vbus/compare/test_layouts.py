"""Every layout really lays its devices out, by the rules of PCI, until it cannot."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vbus.compare.laid import check
from vbus.compare.layouts import LAYOUTS, lay_out
from vbus.compare.layouts.base import find_limit
from vbus.compare.pci import IO_WINDOW, BarShape, Kind
from vbus.compare.platforms import BARE, PLATFORMS, Q35, Platform
from vbus.compare.space import ExhaustedError

ALL = pytest.mark.parametrize("name", LAYOUTS)
MACHINES = pytest.mark.parametrize("machine", PLATFORMS)


@ALL
@MACHINES
@settings(deadline=None, max_examples=12)
@given(devices=st.integers(1, 600))
def test_no_allocation_breaks_a_rule(name: str, machine: str, devices: int) -> None:
    """R14, R20 to R24, R31, R32, R52: nothing overlaps, all is aligned, windows hold
    what is behind them, vectors and bus numbers are given once."""
    platform = PLATFORMS[machine]
    try:
        laid = lay_out(LAYOUTS[name], devices, platform)
    except ExhaustedError:
        assert devices > find_limit(LAYOUTS[name], platform).devices
    else:
        check(laid, platform.memory_window)


@ALL
@MACHINES
def test_the_limit_is_where_the_next_device_does_not_fit(
    name: str, machine: str
) -> None:
    layout, platform = LAYOUTS[name], PLATFORMS[machine]
    limit = find_limit(layout, platform)
    check(lay_out(layout, limit.devices, platform), platform.memory_window)
    if limit.error is None:
        assert limit.devices == 8192
    else:
        with pytest.raises(ExhaustedError) as caught:
            lay_out(layout, limit.devices + 1, platform)
        assert caught.value.resource == limit.error.resource


@ALL
def test_each_device_has_a_function_or_a_bridge_stands_for_it(name: str) -> None:
    """R1, R14: which layouts show N devices as N functions and which as one."""
    laid = lay_out(LAYOUTS[name], 14, BARE)
    devices = [one for one in laid.members if one.name.startswith("virtio ")]
    if name in ("vbus-bridge", "root-virtio"):
        assert len(laid.members) == 1
    else:
        assert [one.name for one in devices] == [f"virtio {n}" for n in range(14)]


@settings(deadline=None, max_examples=20)
@given(devices=st.integers(1, 8192))
def test_the_bridge_takes_the_same_for_any_number_of_devices(devices: int) -> None:
    """R10: "N devices cost no extra BAR, no extra window, no extra vector"."""
    one, many = (lay_out(LAYOUTS["vbus-bridge"], n, Q35) for n in (1, devices))
    assert one.placement.bars == many.placement.bars
    assert one.placement.windows == many.placement.windows == []
    assert one.interrupts == many.interrupts
    assert one.enumeration == many.enumeration
    assert len(one.topology.buses) == len(many.topology.buses) == 1


def test_the_bridge_is_the_function_that_is_served() -> None:
    """R1, R62: its BARs are read off the product's own configuration space."""
    [bridge] = lay_out(LAYOUTS["vbus-bridge"], 1, BARE).members
    assert [(bar.kind, bar.size) for bar in bridge.bars][:2] == [
        (Kind.MEMORY, 64),
        (Kind.IO, 32),
    ]


@pytest.mark.parametrize(
    ("name", "resource"),
    [
        ("virtio-modern", "bus numbers"),
        ("virtio-transitional", "I/O ports"),
        ("virtio-modern-ports", "bus numbers"),
        ("virtio-transitional-ports", "I/O ports"),
        ("narrow-windows", "bus numbers"),
        ("four-bar", "I/O ports"),
        ("segmented", "segments of MMIO"),
    ],
)
def test_what_runs_out_first(name: str, resource: str) -> None:
    """R14, R20, R21, R31, R32, R52."""
    error = find_limit(LAYOUTS[name], BARE).error
    assert error is not None
    assert error.resource == resource


def test_a_port_claims_4_kib_for_a_bar_of_32_bytes() -> None:
    """R31: one transitional device behind a port, and what it costs in ports."""
    laid = lay_out(LAYOUTS["virtio-transitional-ports"], 1, BARE)
    assert (laid.used(io=True), laid.claimed(io=True)) == (32, IO_WINDOW)


def test_narrow_windows_claim_less_and_still_waste() -> None:
    """R32: "smaller but still fragmenting"."""
    narrow = lay_out(LAYOUTS["narrow-windows"], 14, BARE)
    wide = lay_out(LAYOUTS["virtio-transitional-ports"], 14, BARE)
    assert narrow.claimed(io=True) < wide.claimed(io=True)
    assert narrow.claimed(io=True) > narrow.used(io=True)


def test_no_windows_waste_nothing_but_need_a_map_entry_for_each_bar() -> None:
    """R32: "good for integrated functions, needs a large map elsewhere"."""
    laid = lay_out(LAYOUTS["no-windows"], 14, BARE)
    assert laid.placement.windows == []
    assert laid.claimed(io=True) == laid.used(io=True)
    assert laid.placement.map_entries == 14 * 3


def test_a_group_for_each_port_and_one_for_all_behind_a_bridge() -> None:
    """R51: what is isolated on its own: a port; a slot of the root bus; a bridge."""
    ports = lay_out(LAYOUTS["virtio-modern-ports"], 40, BARE)
    slots = lay_out(LAYOUTS["virtio-modern"], 40, BARE)
    bridge = lay_out(LAYOUTS["vbus-bridge"], 40, BARE)
    assert ports.groups == 40
    assert slots.groups == 32
    assert bridge.groups == 1


def test_each_segment_has_one_owner() -> None:
    """R52: "BARs of different groups never share a segment"."""
    laid = lay_out(LAYOUTS["segmented"], 100, BARE)
    groups = {one.name: one.group for one in laid.members}
    owner: dict[int, str] = {}
    for bar in laid.placement.bars:
        segment = bar.range.start >> 23
        assert owner.setdefault(segment, groups[bar.function]) == groups[bar.function]
    assert len(owner) == 100


def test_a_machine_with_less_room_holds_fewer() -> None:
    """Limits come from the machine's room, not from a formula."""
    small = Platform(
        "small",
        "",
        memory=(0xFE00_0000, 0xFEC0_0000),
        high_memory=(4 << 30, (4 << 30) + (1 << 20)),
        memory_window=1 << 20,
    )
    limit = find_limit(LAYOUTS["virtio-modern-ports"], small)
    assert limit.error is not None
    assert "memory" in limit.error.resource
    assert 0 < limit.devices < find_limit(LAYOUTS["virtio-modern-ports"], BARE).devices


def test_q35_runs_out_of_slots_before_bus_numbers() -> None:
    """R14: its own functions stand in two of the 32 slots that ports could have."""
    limit = find_limit(LAYOUTS["virtio-modern-ports"], Q35)
    assert limit.devices == 30 * 8
    assert limit.error is not None
    assert limit.error.resource == "slots"


def test_a_window_that_nothing_needs_aligns_its_neighbours() -> None:
    """R21: as SeaBIOS does it, read off a guest. No four-BAR function has prefetchable
    memory, but the bridge to two of them could forward some: so that of another
    function begins at the granularity of windows."""
    one = BarShape(Kind.PREFETCHABLE, 0x4000, wide=True)
    other = dataclasses.replace(Q35, fixed=(*Q35.fixed, (1, 0, "other", (one,))))
    places = {}
    for devices in (1, 30):
        laid = lay_out(LAYOUTS["four-bar"], devices, other)
        [bar] = [bar for bar in laid.placement.bars if bar.function == "other"]
        places[devices] = bar.range.start
        kinds = {window.kind for window in laid.placement.windows}
        assert kinds == ({Kind.MEMORY, Kind.IO} if devices == 30 else set())
    assert places == {1: 0xFEBF_8000, 30: 0xFEA0_0000}
