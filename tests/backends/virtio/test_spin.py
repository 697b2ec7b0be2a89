"""Queues that look for requests before they sleep; here they look for ever."""

import trio
import trio.testing

from backends.virtio.constants import Status
from tests.backends.virtio.rig import Rig, rigged
from tests.backends.virtio.test_device import Echo

FOR_EVER_US = 1e12


async def let_it_look() -> None:
    for _ in range(20):
        await trio.lowlevel.checkpoint()


async def answered(rig: Rig, data: bytes) -> bool:
    """Put a request in without kicking, and wait for it."""
    request = rig.add(0, data, len(data))
    with trio.fail_after(10):
        while not rig.collect(0):
            await trio.lowlevel.checkpoint()
    return rig.data(request) == data


async def test_a_queue_that_looks_wants_no_kick() -> None:
    echo = Echo()
    echo.spin_us = FOR_EVER_US
    kicks: list[int] = []
    echo.kick = kicks.append  # type: ignore[method-assign]
    async with rigged(echo) as rig:
        rig.start()
        for number in range(40):
            assert await answered(rig, bytes([number]) * 8)
        assert kicks == [0], "a fresh ring asks for the first"


async def test_a_reset_ends_the_look_and_the_next_driver_is_served() -> None:
    echo = Echo()
    echo.spin_us = FOR_EVER_US
    async with rigged(echo) as rig:
        for _ in range(3):
            rig.start()
            assert await answered(rig, b"question")
            echo.set_status(0)
            await let_it_look()


async def test_what_was_found_and_not_served_is_forgotten_by_a_reset() -> None:
    """The chains are of the driver before."""
    echo = Echo()
    echo.spin_us = FOR_EVER_US
    async with rigged(echo) as rig:
        rig.start()
        await let_it_look()
        ring = echo.queues[1].ring
        assert ring is not None
        rig.add(1, b"x", 8)
        while not ring._ahead:
            assert ring._look(10_000)
        ring.close()
        assert ring.pop(8) == ()
        ring._ahead = ()
        rig.add(1, b"y", 8)
        assert ring._look(10_000)
        assert ring._ahead == (), "its memory is not touched any more"
        with trio.testing.assert_checkpoints():
            await ring.wait()


async def test_a_ring_that_breaks_while_it_is_looked_at_breaks_the_device() -> None:
    echo = Echo()
    echo.spin_us = FOR_EVER_US
    async with rigged(echo) as rig:
        rig.start()
        await let_it_look()
        queue = echo.queue(0)
        rig.space.write(queue.setup.driver + 2, b"\xff\x7f")  # 32767 more requests
        with trio.fail_after(10):
            while echo.broken is None:
                await trio.lowlevel.checkpoint()
        assert Status.NEEDS_RESET in echo.status


async def test_without_spin_a_queue_sleeps_until_it_is_kicked() -> None:
    echo = Echo()
    async with rigged(echo) as rig:
        rig.start()
        await let_it_look()
        assert rig.rings[0].add_batch([([], [(1 << 20, 8)], None)]) == 1
        assert rig.rings[0].kick_needed()
