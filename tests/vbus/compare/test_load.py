"""Interrupts under load, simulated: seeds make a result repeatable."""

import pytest

from vbus.compare.load import SCHEMES, simulate

ALL = pytest.mark.parametrize("scheme", SCHEMES)


@ALL
def test_interrupts_per_event_fall_as_load_rises(scheme: str) -> None:
    """R6: "the heavier the I/O, the fewer interrupts per event"."""
    found = [simulate(scheme, 32, load).per_thousand for load in (0.1, 0.5, 0.9)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_queue_interrupts_less_than_a_vector_each(load: float) -> None:
    """R6, R14: one vector for many devices joins what arrives while it drains."""
    each = simulate("vector-each", 32, load)
    one = simulate("coalesced", 32, load)
    assert one.interrupts < each.interrupts


@pytest.mark.parametrize("load", [0.7, 0.9, 0.95])
def test_priorities_keep_the_urgent_event_quick(load: float) -> None:
    """R7: higher priorities first, whatever waits."""
    flat = simulate("coalesced", 32, load)
    first = simulate("prioritised", 32, load)
    assert first.urgent_high_us < flat.urgent_high_us
    assert first.interrupts <= flat.packets


@ALL
def test_a_single_device_is_the_same_in_every_scheme(scheme: str) -> None:
    """With nothing to coalesce there is nothing to win."""
    assert (
        simulate(scheme, 1, 0.5).interrupts
        == simulate("vector-each", 1, 0.5).interrupts
    )


@ALL
def test_the_same_seed_gives_the_same_result(scheme: str) -> None:
    assert simulate(scheme, 8, 0.5, seed=7) == simulate(scheme, 8, 0.5, seed=7)
    assert simulate(scheme, 8, 0.5, seed=7) != simulate(scheme, 8, 0.5, seed=8)


@ALL
def test_every_packet_is_handled_and_no_interrupt_is_for_nothing(scheme: str) -> None:
    outcome = simulate(scheme, 16, 0.6, packets=3000)
    assert 0 < outcome.interrupts <= outcome.packets == 3000
