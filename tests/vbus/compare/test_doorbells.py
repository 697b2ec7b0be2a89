"""Doorbells: addresses are really given out, one to a device."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vbus.compare.laid import disjoint
from vbus.compare import doorbells
from vbus.compare.costs import PUBLISHED
from vbus.compare.platforms import BARE, Q35
from vbus.compare.space import ExhaustedError

ALL = pytest.mark.parametrize(
    "doorbell", doorbells.DOORBELLS, ids=lambda doorbell: doorbell.name
)


@ALL
@settings(deadline=None, max_examples=10)
@given(devices=st.integers(1, 300))
def test_no_two_devices_have_the_same(
    doorbell: doorbells.Doorbell, devices: int
) -> None:
    """R30, R32."""
    space = doorbells.allocate(doorbell, devices, Q35)
    if space is not None:
        assert len(space.taken) == devices
        assert disjoint(space.taken)


@ALL
def test_the_limit_is_where_addresses_run_out(doorbell: doorbells.Doorbell) -> None:
    """R31, R32."""
    count, error = doorbells.limit(doorbell, BARE)
    if error is None:
        assert count == 1 << 16 or doorbell.room is None
    else:
        doorbells.allocate(doorbell, count, BARE)
        with pytest.raises(ExhaustedError):
            doorbells.allocate(doorbell, count + 1, BARE)


@ALL
def test_each_has_a_cost(doorbell: doorbells.Doorbell) -> None:
    """R30: a number, or why there is none."""
    cost = PUBLISHED.entries[doorbell.cost]
    assert (cost.modelled is None) == bool(cost.missing)


def test_narrower_windows_mean_fewer_doorbells_than_flat_ports() -> None:
    """R32: "smaller but still fragmenting"."""
    bells = {one.name: one for one in doorbells.DOORBELLS}
    narrow, _ = doorbells.limit(bells["narrow-window"], BARE)
    flat, _ = doorbells.limit(bells["pio-exit"], BARE)
    assert 15 < narrow < flat
