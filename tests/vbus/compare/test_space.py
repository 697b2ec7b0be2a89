"""Spaces: what is taken is taken once, aligned, and a refusal names what ran out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vbus.compare.laid import disjoint
from vbus.compare.space import (
    ExhaustedError,
    Space,
    align_down,
    align_up,
    power_of_two,
)
from vbus.errors import InvalidError, NoSpaceError

END = 1 << 12
asks = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), max_size=60)


@given(asks)
def test_what_is_taken_never_overlaps_and_is_aligned(
    wanted: list[tuple[int, int]],
) -> None:
    space = Space("room", 16, END)
    for size, power in wanted:
        try:
            taken = space.take(size, 1 << power, "one")
        except ExhaustedError:
            continue
        assert taken.start % (1 << power) == 0
        assert taken.size == size
        assert taken.start >= 16
        assert taken.end <= END
    assert disjoint(space.taken)
    assert space.used == sum(one.size for one in space.taken)


@given(asks)
def test_a_refusal_means_that_it_fits_nowhere(wanted: list[tuple[int, int]]) -> None:
    """Every free place is tried, against a map of single numbers as the oracle."""
    space = Space("room", 0, 256)
    free = [True] * 256
    for size, power in wanted:
        places = range(0, 256 - size + 1, 1 << power)
        fits = [at for at in places if all(free[at : at + size])]
        if not fits:
            with pytest.raises(ExhaustedError):
                space.take(size, 1 << power, "one")
            continue
        taken = space.take(size, 1 << power, "one")
        assert taken.start == fits[0]
        free[taken.start : taken.end] = [False] * size


def test_a_place_can_be_taken_once() -> None:
    space = Space("room", 0, 64)
    space.place(16, 16, "one")
    for start, size in ((16, 16), (15, 2), (31, 1), (0, 17), (60, 5), (-1, 1)):
        with pytest.raises(ExhaustedError, match="room ran out: two does not fit"):
            space.place(start, size, "two")
    space.place(32, 32, "two")
    space.place(0, 16, "three")
    assert space.used == 64


def test_a_refusal_names_the_resource_who_asked_and_what_is_left() -> None:
    space = Space("I/O ports", 0, 0x100)
    space.place(0, 0x40, "one")
    with pytest.raises(ExhaustedError, match="two needs 0x100") as caught:
        space.take(0x100, 0x100, "two")
    assert caught.value.resource == "I/O ports"
    assert "0xc0 of 0x100 are free" in caught.value.detail
    assert isinstance(caught.value, NoSpaceError)


@pytest.mark.parametrize("size", [0, -4])
def test_nothing_cannot_be_taken(size: int) -> None:
    with pytest.raises(InvalidError):
        Space("room", 0, 64).place(0, size, "none")


@given(st.integers(0, 1 << 40), st.integers(0, 30))
def test_rounding(value: int, power: int) -> None:
    step = 1 << power
    assert align_up(value, step) % step == align_down(value, step) % step == 0
    assert align_down(value, step) <= value <= align_up(value, step)
    assert align_up(value, step) - align_down(value, step) in (0, step)


@given(st.integers(1, 1 << 40))
def test_the_next_power_of_two_is_the_least(value: int) -> None:
    found = power_of_two(value)
    assert found & (found - 1) == 0
    assert found // 2 < value <= found


def test_a_gap_that_is_too_small_by_one_is_passed_over() -> None:
    space = Space("room", 0, 64)
    space.place(7, 9, "one")
    assert space.take(8, 1, "two").start == 16
    assert space.take(7, 1, "three").start == 0


def test_what_is_taken_of_a_copy_stays_free() -> None:
    space = Space("room", 0, 64)
    space.place(0, 16, "one")
    other = space.copy()
    assert other.take(48, 16, "two").start == 16
    assert space.take(48, 16, "three").start == 16
    assert (len(space.taken), len(other.taken)) == (2, 2)
