"""A venet that goes on in another process's place: no frame and no event is lost."""

import os

import msgspec
import pytest
import trio

from tests.backends.driver import Driver, Modes
from tests.backends.stage import LOOPBACK, Stage, staged
from tests.backends.test_venet_modes import ether, every_mode
from vbus.errors import ProtocolError
from vbus.saved import Held, Kept, SavedBridge


async def taken_over(new: Stage, old: Stage) -> None:
    """Have the guest of `old` go on with `new`; nothing of `old` runs any more."""
    kept = Kept()
    data = msgspec.msgpack.encode(old.recorded.bridge.save(kept))
    held = Held([os.dup(fd) for fd in kept.fds])
    for scope in old.effects.running.values():
        scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    new.peer.detach()
    new.recorded.bridge.attach(old.peer)
    old.peer.bridge = new.recorded.bridge
    new.recorded.bridge.resume(msgspec.msgpack.decode(data, type=SavedBridge), held)
    held.close()
    await trio.testing.wait_all_tasks_blocked()


def completed(driver: Driver) -> int:
    return len(driver.take_events()) if driver.modes.txc else driver.reap()


@every_mode
async def test_frames_go_on_in_every_mode(modes: Modes) -> None:
    """R15, R60: rings stay where they were, what was negotiated holds."""
    async with staged(LOOPBACK) as old, staged(LOOPBACK) as new:
        driver = await old.driver(modes=modes)
        if modes.events & 1:
            driver.take_events()
        stages, done = (old, new), 0
        for turn, stage in enumerate(stages):
            if turn:
                await taken_over(new, old)
            for number in range(modes.count + 3):
                frame = ether(bytes([turn + 1, number]) * 30)
                driver.send(frame, cuts=(20,))
                await stage.settle()
                (got,) = driver.receive()
                assert got.data == frame
                done += completed(driver)
        assert done == 2 * (modes.count + 3)
        assert not (modes.events and driver.take_events())
        assert not new.failures()


async def test_completions_that_wait_for_room_are_told_by_the_next() -> None:
    """R60: the event ring is full of what the guest has not taken."""
    async with staged(LOOPBACK) as old, staged(LOOPBACK) as new:
        driver = await old.driver(modes=Modes(sg=0x0F, events=3))
        for _ in range(2):
            for number in range(driver.modes.count):
                driver.send(ether(bytes([number]) * 60), cuts=(20,))
            await old.settle()
            driver.receive()
        await taken_over(new, old)
        events: list[bytes] = []
        while some := driver.take_events():
            events += some
            await new.settle()
        cookies = [event[16:24] for event in events if event[8] == 1]
        assert len(cookies) == 2 * driver.modes.count
        assert sorted(cookies[: driver.modes.count]) == sorted(
            cookies[driver.modes.count :]
        )


@pytest.mark.parametrize(
    "state",
    [
        b"",
        msgspec.msgpack.encode({"accepted": {}}),
        msgspec.msgpack.encode({"accepted": {0: 1}, "up": 7}),
        msgspec.msgpack.encode([1, 2]),
    ],
)
async def test_a_state_that_makes_no_sense_ends_the_connection(state: bytes) -> None:
    async with staged(LOOPBACK) as old, staged(LOOPBACK) as new:
        await old.driver()
        device = new.device("loop0")
        (connection,) = old.recorded.bridge.connections
        with pytest.raises(ProtocolError):
            device.resume(connection, state, [*connection.shm.values()])
