"""Returning to a host that is replaced: how often, how long, and what ends it."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from proxy.again import returning
from vbus.errors import BusyError, NoDeviceError, UnreachableError, VbusError


def script(
    *steps: VbusError | None,
) -> tuple[Callable[[], Awaitable[None]], list[float]]:
    """A guest whose n-th attempt ends so, and when each was made."""
    times: list[float] = []

    async def once() -> None:
        step = steps[min(len(times), len(steps) - 1)]
        times.append(trio.current_time())
        if step is not None:
            raise step

    return once, times


async def test_what_ends_by_itself_is_done_once(autojump_clock: MockClock) -> None:
    once, times = script(None)
    await returning(once, 10)
    assert len(times) == 1


async def test_a_host_that_comes_back_is_attached_to_again(
    autojump_clock: MockClock,
) -> None:
    """R60: killed twice, and down for a while."""
    gone, down = NoDeviceError("gone"), UnreachableError("down")
    once, times = script(gone, down, down, gone, down, None)
    await returning(once, 10)
    assert len(times) == 6


async def test_without_patience_the_first_end_is_the_last(
    autojump_clock: MockClock,
) -> None:
    once, times = script(NoDeviceError("gone"))
    with pytest.raises(NoDeviceError):
        await returning(once, 0)
    assert len(times) == 1


async def test_patience_ends(autojump_clock: MockClock) -> None:
    once, times = script(NoDeviceError("gone"), UnreachableError("down"))
    with pytest.raises(UnreachableError):
        await returning(once, 10)
    assert 10 <= times[-1] - times[0] < 11


async def test_patience_begins_anew_each_time_the_host_was_there(
    autojump_clock: MockClock,
) -> None:
    gone, down = NoDeviceError("gone"), UnreachableError("down")
    once, times = script(*[gone, *[down] * 150] * 3, None)
    await returning(once, 10)
    assert times[-1] - times[0] > 20


@pytest.mark.parametrize("error", [UnreachableError("nobody"), BusyError("another")])
async def test_who_never_had_a_host_does_not_wait_for_one(error: VbusError) -> None:
    once, times = script(error)
    with pytest.raises(type(error)):
        await returning(once, 10)
    assert len(times) == 1
