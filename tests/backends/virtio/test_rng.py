"""virtio-rng: bytes of the kernel, at a limited rate."""

import pytest
import trio
import trio.testing

from backends.virtio.constants import Status
from backends.virtio.rng import CHUNK, VirtioRng
from tests.backends.virtio.rig import rigged, settle
from vbus.errors import InvalidError


async def test_bytes_come_and_differ() -> None:
    async with rigged(VirtioRng()) as rig:
        rig.start()
        first = await rig.request(0, room=64)
        assert len(first) == 64
        assert await rig.request(0, room=64) != first
        assert len(await rig.request(0, room=1)) == 1


async def test_a_large_buffer_gets_a_chunk() -> None:
    async with rigged(VirtioRng()) as rig:
        rig.start()
        assert len(await rig.request(0, room=CHUNK * 3)) == CHUNK


async def test_the_source_is_asked_for_every_byte_that_is_given() -> None:
    asked = []

    def source(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    async with rigged(VirtioRng(source=source)) as rig:
        rig.start()
        assert await rig.request(0, room=5) == b"\1" * 5
        assert await rig.request(0, room=3) == b"\2" * 3
        assert asked == [5, 3]


@pytest.mark.parametrize(("out", "room"), [(b"x", 8), (b"x", 0)])
async def test_a_readable_buffer_needs_a_reset(out: bytes, room: int) -> None:
    async with rigged(VirtioRng()) as rig:
        rig.start()
        rig.add(0, out, room)
        await settle()
        assert Status.NEEDS_RESET in rig.device.status


async def test_the_rate_holds_over_time_and_a_pause_saves_up_one_chunk(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rng = VirtioRng(bytes_per_second=1000)
    async with rigged(rng) as rig:
        rig.start()
        await trio.sleep(100)
        start = trio.current_time()
        assert len(await rig.request(0, room=CHUNK)) == CHUNK
        assert trio.current_time() == start
        for _ in range(5):
            await rig.request(0, room=1000)
        assert trio.current_time() - start == pytest.approx(5)
        assert rng.io_statistics().waits == 5
        assert rng.io_statistics().given_bytes == CHUNK + 5000


async def test_a_reset_ends_the_wait_of_a_limited_request(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rigged(VirtioRng(bytes_per_second=1)) as rig:
        rig.start()
        await rig.request(0, room=CHUNK)
        late = rig.add(0, room=CHUNK)
        await trio.sleep(1)
        rig.device.set_status(0)
        await trio.sleep(2 * CHUNK)
        assert rig.space.read(late.address, CHUNK) == bytes(CHUNK)


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(InvalidError):
        VirtioRng(bytes_per_second=-1)
