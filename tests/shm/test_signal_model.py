"""The signal protocol loses no wake-up, and every fence of it is needed."""

import pytest

from tests.shm.signal_model import (
    Op,
    handler,
    lost_wakeup,
    poller,
    signaller,
    without,
)

WAKERS = {"handler": handler, "poller": poller}
MODELS = pytest.mark.parametrize("pso", [False, True], ids=["tso", "pso"])


def fences(program: list[Op]) -> list[str]:
    return list(dict.fromkeys(op.name for op in program if op.what == "fence"))


# Disabling is no race of 5.4: a late store only costs a spurious notification.
NEEDED = [
    (waker, name)
    for waker, program in WAKERS.items()
    for name in fences(program()) + fences(signaller())
    if name != "disable"
]


@MODELS
@pytest.mark.parametrize("waker", WAKERS)
def test_no_interleaving_loses_a_wakeup(waker: str, pso: bool) -> None:
    """R6: whatever is signalled last is seen, whoever sleeps when."""
    assert not lost_wakeup(WAKERS[waker](), signaller(), pso=pso)


@MODELS
@pytest.mark.parametrize(("waker", "name"), NEEDED)
def test_each_fence_is_needed(waker: str, name: str, pso: bool) -> None:
    """R6: without any one fence of ABI 5.4 a wake-up is lost, and this finds it."""
    program, peer = without(WAKERS[waker](), name), without(signaller(), name)
    assert (program, peer) != (WAKERS[waker](), signaller())
    assert lost_wakeup(program, peer, pso=pso)


@MODELS
def test_the_fence_of_disable_is_not_needed_for_that(pso: bool) -> None:
    """R6: removing it loses nothing, so the explorer does not cry wolf."""
    assert not lost_wakeup(without(poller(), "disable"), signaller(), pso=pso)
