"""Segmented MMIO: each segment has one owner (R52)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vbus.compare.laid import disjoint
from vbus.compare.segments import SegmentedSpace
from vbus.compare.space import ExhaustedError
from vbus.errors import InvalidError

GIB = 1 << 30
START = 0xC000_0000
asks = st.lists(st.tuples(st.integers(12, 27), st.integers(0, 9)), max_size=80)


@given(asks)
def test_groups_never_share_a_segment(wanted: list[tuple[int, int]]) -> None:
    """R52: whatever is asked for, by whom, in which order."""
    space = SegmentedSpace("MMIO", START, GIB)
    taken = []
    for power, group in wanted:
        try:
            taken.append((space.take(1 << power, f"group {group}", "bar"), group))
        except ExhaustedError:
            continue
    assert disjoint(bar for bar, _ in taken)
    owners: dict[int, int] = {}
    for bar, group in taken:
        assert bar.start % bar.size == 0
        assert bar.start >= START
        assert bar.end <= START + GIB
        first = (bar.start - START) // space.segment
        last = (bar.end - 1 - START) // space.segment
        for segment in range(first, last + 1):
            assert owners.setdefault(segment, group) == group
    assert space.claimed == len(owners) * space.segment


def test_128_segments_of_8_mib() -> None:
    """R52: "1 GiB of 32-bit MMIO in 128 equal segments"."""
    space = SegmentedSpace("MMIO", START, GIB)
    assert space.segment == 8 << 20
    for number in range(128):
        space.take(4096, f"group {number}", "bar")
    with pytest.raises(ExhaustedError, match="segments of MMIO"):
        space.take(4096, "one more", "bar")
    space.take(4096, "group 0", "a second one of the same group")


def test_a_large_bar_takes_consecutive_segments() -> None:
    """R52."""
    space = SegmentedSpace("MMIO", START, GIB)
    space.take(4096, "small", "bar")
    large = space.take(64 << 20, "large", "bar")
    assert large.start % (64 << 20) == 0
    assert [(run.start, run.size, run.owner) for run in space.owners] == [
        (0, 1, "small"),
        (8, 8, "large"),
    ]


def test_64_bit_regions_are_divided_the_same_way() -> None:
    """R52: "64-bit regions divided the same way for VF BARs"."""
    space = SegmentedSpace("VF BARs", 64 * GIB, 128 * GIB)
    assert space.segment == GIB
    assert space.take(4 * GIB, "vf", "bar").start == 64 * GIB


@pytest.mark.parametrize("size", [GIB - 1, 3 * GIB, 128 * 3])
def test_segments_are_powers_of_two(size: int) -> None:
    with pytest.raises(InvalidError):
        SegmentedSpace("MMIO", START, size)
