"""A guest that moves its BARs stays in its segments (R53)."""

from hypothesis import given
from hypothesis import strategies as st

from vbus.compare.remap import VirtualBar, reached
from vbus.compare.segments import SegmentedSpace

START, GIB = 0xC000_0000, 1 << 30
writes = st.lists(st.integers(0, (1 << 32) - 1) | st.integers(START, START + GIB - 1))


def bars(sizes: list[int]) -> list[VirtualBar]:
    space = SegmentedSpace("MMIO", START, GIB)
    return [
        VirtualBar(space, f"group {n}", space.take(size, f"group {n}", "bar"))
        for n, size in enumerate(sizes)
    ]


@given(
    st.lists(st.sampled_from([0x1000, 0x4000, 1 << 23, 1 << 25]), max_size=12), writes
)
def test_no_write_moves_a_bar_to_another_group(
    sizes: list[int], values: list[int]
) -> None:
    """R53: whatever is written, in whichever order, to BARs of all sizes."""
    for one in bars(sizes):
        for value in values:
            one.write(value)
            assert one.space.belongs(one.real, one.group)
            assert one.real.start % one.real.size == 0
            assert one.shown == value & -one.real.size  # the guest reads what it wrote


def test_a_bar_can_move_within_its_own_segment() -> None:
    """Else it would be no answer: a guest may lay out what it owns."""
    [one] = bars([0x4000])
    segment = one.space.segment
    one.write(one.real.start + segment - 0x4000)
    assert one.real.start == START + segment - 0x4000
    one.write(one.real.start + 0x4000)  # the first of the next segment
    assert one.real.start == START + segment - 0x4000


def test_without_the_table_guests_would_meet() -> None:
    """The model can fail: as written, these addresses are others'."""
    two = bars([0x4000, 0x4000])
    asked, got = reached(two, [one.real.start for one in two])
    assert (asked, got) == (2, 0)
