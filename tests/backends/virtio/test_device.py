"""The life of a virtio device: features, status, resets, breaks, configuration."""

from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId, Ring, Status, bits
from backends.virtio.device import Chain, DeviceQueue, LiveRing, VirtioDevice
from backends.virtio.features import closed, refusal, unmet
from tests.backends.virtio.rig import LIVE, SETUP, Rig, rigged, settle
from vbus.errors import BusyError, InvalidError, NotFoundError

FIELDS = (
    Field("level", 0, "H", changes=True),
    Field("name", 2, "6s", changes=True, written=Written.ANY),
    Field("early", 8, "I", written=Written.INIT),
    Field("fixed", 12, "I"),
)
FIRST, SECOND = 0, 1
PLAIN = bits(Ring.PACKED)
DEPENDENCIES = {SECOND: (FIRST,)}


class Echo(VirtioDevice):
    """Writes back what it reads; queue 0 can be made to wait outside, like a disk."""

    device_id = DeviceId.ENTROPY
    dependencies = DEPENDENCIES

    def __init__(self, *, latch: bool = False, queues: int = 2) -> None:
        config = ConfigSpace(FIELDS, latch=latch)
        super().__init__([16] * queues, features=3, config=config)
        self.change_config(level=7, fixed=42)
        self.gate = trio.Event()
        self.gate.set()
        self.handled = 0
        self.inside = 0
        self.written: list[str] = []

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        self.inside += 1
        try:
            with trio.CancelScope(shield=True):
                if queue.index == 0:
                    await self.gate.wait()
        finally:
            self.inside -= 1
        for chain in chains:
            data = chain.read()
            if ring.alive:
                chain.write(0, data)
            self.handled += 1
            self.complete(queue.index, ring, chain, len(data))
        await trio.lowlevel.checkpoint()

    def config_written(self, name: str) -> None:
        self.written.append(name)


@pytest.fixture
def echo() -> Echo:
    return Echo()


# Features (2.2, 3.1)


async def test_a_good_subset_settles(echo: Echo) -> None:
    async with rigged(echo) as rig:
        assert rig.negotiate() == SETUP | Status.FEATURES_OK
        assert echo.features == echo.offered


@pytest.mark.parametrize(
    ("without", "extra", "reason"),
    [
        (0, 1 << 20, "were not offered"),
        (bits(Ring.VERSION_1), 0, "VERSION_1"),
        (bits(FIRST), 0, "needs one of"),
    ],
)
async def test_features_ok_stays_clear_for_a_bad_set(
    echo: Echo, without: int, extra: int, reason: str
) -> None:
    async with rigged(echo) as rig:
        assert rig.negotiate(without, extra=extra) == SETUP
        assert reason in str(echo.statistics().refusal)
        echo.set_status(LIVE)
        assert Status.DRIVER_OK not in echo.status
        echo.set_features(bits(Ring.VERSION_1))  # it may try again
        echo.set_status(SETUP | Status.FEATURES_OK)
        assert Status.FEATURES_OK in echo.status


async def test_features_are_frozen_once_settled(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.negotiate()
        before = echo.features
        echo.set_features(0)
        echo.set_status(LIVE)
        assert echo.features == echo.accepted == before


async def test_a_legacy_driver_has_the_low_features_less_what_lacks_its_needs(
    echo: Echo,
) -> None:
    """R20, R27."""
    async with rigged(echo):
        echo.legacy = True
        echo.set_status(SETUP)
        echo.set_features(bits(SECOND, Ring.EVENT_IDX, 23, Ring.VERSION_1))
        echo.set_status(SETUP | Status.DRIVER_OK)
        assert echo.features == bits(Ring.EVENT_IDX)


@given(st.integers(0, 255), st.integers(0, 255))
def test_closing_a_set_gives_one_that_is_not_refused(offered: int, word: int) -> None:
    needs = {1: (0,), 2: (1, 3), 5: (2,), 6: (7,)}
    good = closed(word, needs)
    assert good & ~word == 0
    assert unmet(good, needs) is None
    version = bits(Ring.VERSION_1)
    assert refusal(offered | word | version, good | version, needs) is None


# Status (2.1)


async def test_a_driver_cannot_clear_status_bits_nor_set_needs_reset(
    echo: Echo,
) -> None:
    async with rigged(echo) as rig:
        rig.start()
        echo.set_status(Status.ACKNOWLEDGE | Status.NEEDS_RESET)
        assert echo.status == LIVE


async def test_nothing_is_consumed_before_driver_ok(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.negotiate(bits(Ring.PACKED))
        rig.make_ring(0)
        request = rig.add(0, b"early", 5)
        echo.kick(0)
        await settle()
        assert not rig.collect(0)
        echo.set_status(LIVE)
        assert await rig.done(0, request) == b"early"


@pytest.mark.parametrize("without", [0, bits(Ring.PACKED), bits(Ring.EVENT_IDX, 34)])
async def test_requests_are_answered_in_every_ring_layout(
    echo: Echo, without: int
) -> None:
    async with rigged(echo) as rig:
        rig.start(without)
        for n in range(100):
            assert await rig.request(n % 2, b"%d" % n, 8) == b"%d" % n


async def test_failed_stops_the_device_until_a_reset(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.start()
        echo.set_status(LIVE | Status.FAILED)
        rig.add(0, b"x", 1)
        echo.kick(0)
        await settle()
        assert not rig.collect(0)
        rig.start()
        assert await rig.request(0, b"y", 1) == b"y"


@pytest.mark.parametrize("without", [PLAIN, PLAIN | bits(Ring.EVENT_IDX)])
async def test_a_driver_that_wants_no_interrupt_gets_none(
    echo: Echo, without: int
) -> None:
    async with rigged(echo) as rig:
        rig.start(without)
        await rig.request(0, b"x", 1)
        rig.rings[0].disable_interrupts()
        before = len(rig.interrupts)
        for _ in range(6):
            rig.add(0, b"y", 1)
            await settle()
        assert len(rig.interrupts) == before
        assert len(rig.collect(0)) == 6


# Reset (2.4, R26)


def reach(rig: Rig, state: str) -> None:
    if state == "fresh":
        return
    if state in ("acknowledged", "negotiated"):
        rig.device.set_status(SETUP)
        if state == "negotiated":
            rig.negotiate()
        return
    rig.start(bits(Ring.PACKED), legacy=state == "legacy")
    if state == "failed":
        rig.device.set_status(LIVE | Status.FAILED)
    elif state == "broken":
        rig.device.fail("a test")


@pytest.mark.parametrize(
    "state",
    ["fresh", "acknowledged", "negotiated", "live", "legacy", "failed", "broken"],
)
async def test_a_reset_works_in_every_state(echo: Echo, state: str) -> None:
    """R26."""
    async with rigged(echo) as rig:
        reach(rig, state)
        await settle()
        echo.set_status(0)
        assert (echo.status, echo.features, echo.broken) == (0, 0, None)
        assert not any(q.enabled or q.ring for q in echo.queues)
        rig.start()
        assert await rig.request(1, b"alive", 5) == b"alive"


async def test_a_reset_is_over_at_once_and_late_work_touches_no_memory(
    echo: Echo,
) -> None:
    """R26: what is under way outside is waited for before the next driver's turn."""
    async with rigged(echo) as rig:
        rig.start()
        echo.gate = trio.Event()
        late = rig.add(0, b"late", 4)
        await settle()
        assert echo.inside == 1
        echo.set_status(0)
        assert echo.status == 0
        rig.space.write(0, bytes(1 << 16))
        rig.start()
        soon = rig.add(1, b"soon", 4)
        await settle()
        assert not rig.collect(1)
        echo.gate.set()
        assert await rig.done(1, soon) == b"soon"
        assert rig.space.read(late.address, 4) == bytes(4)
        assert not rig.collect(0)


async def test_one_queue_is_reset_and_used_again(echo: Echo) -> None:
    """RING_RESET (2.6.1): the other queue does not notice."""
    async with rigged(echo) as rig:
        rig.start()
        assert await rig.request(0, b"a", 1) == b"a"
        echo.reset_queue(0)
        assert not echo.queue(0).enabled
        assert echo.queue(0).setup.size == 16
        assert await rig.request(1, b"b", 1) == b"b"
        rig.make_ring(0, 8)
        assert await rig.request(0, b"c", 1) == b"c"


async def test_who_wants_to_sleep_looks_once_more() -> None:
    """A driver that saw no wish for a kick gives none: its request must be found."""

    class Core:
        wishes = 0

        def disable_kicks(self) -> None:
            pass

        def enable_kicks(self) -> bool:
            self.wishes += 1
            return True

    core = Core()
    ring = LiveRing(core)  # type: ignore[arg-type]
    with trio.fail_after(1):
        await ring.wait()
    assert core.wishes == 1


# Breaks


async def test_a_broken_queue_needs_a_reset_and_says_so(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.start()
        rig.space.write(16 * 16 + 2, b"\x00\x40")  # avail index far ahead
        echo.kick(0)
        await settle()
        assert echo.status == LIVE | Status.NEEDS_RESET
        assert rig.config_interrupts == 1
        assert echo.broken is not None
        rig.add(1, b"x", 1)
        echo.kick(1)
        await settle()
        assert not rig.collect(1)  # the whole device stopped
        rig.start()
        assert await rig.request(1, b"again", 5) == b"again"


async def test_a_ring_outside_memory_breaks_at_driver_ok_alone(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.negotiate(bits(Ring.PACKED))
        echo.queue(0).set_up(size=8, desc=1 << 40, driver=1 << 41, device=1 << 42)
        echo.enable_queue(0)
        assert Status.NEEDS_RESET not in echo.status
        echo.set_status(LIVE)
        assert Status.NEEDS_RESET in echo.status
        await settle()
        rig.start()
        assert await rig.request(0, b"ok", 2) == b"ok"


async def test_memory_that_goes_away_under_a_request_breaks_the_device(
    echo: Echo,
) -> None:
    async with rigged(echo) as rig:
        rig.start()
        echo.gate = trio.Event()
        rig.add(0, b"gone", 4)
        await settle()
        rig.space.clear()
        echo.gate.set()
        await settle()
        assert Status.NEEDS_RESET in echo.status


def test_a_queue_refuses_what_it_cannot_be(echo: Echo) -> None:
    queue = echo.queue(0)
    for size in (0, 3, 32, -1):
        with pytest.raises(InvalidError):
            queue.set_up(size=size)
    queue.set_up(size=3, packed=True)
    queue.enabled = True
    with pytest.raises(BusyError):
        queue.set_up(size=4)
    with pytest.raises(NotFoundError):
        echo.queue(2)
    echo.kick(2)  # a stray kick is nothing


async def test_a_device_is_on_one_transport_at_a_time(echo: Echo) -> None:
    async with rigged(echo) as rig:
        with pytest.raises(InvalidError):
            echo.attach(rig)


async def test_a_transports_features_are_gone_with_it(echo: Echo) -> None:
    async with rigged(echo, features=bits(Ring.ACCESS_PLATFORM)):
        assert echo.offered >> Ring.ACCESS_PLATFORM & 1
    assert not echo.offered >> Ring.ACCESS_PLATFORM & 1


# Configuration (2.5, R25, R27)


def test_fields_are_little_endian_and_read_as_zeros_behind_the_end(echo: Echo) -> None:
    """R27."""
    assert echo.read_config(0, 4) == b"\x07\0\0\0"
    assert echo.read_config(12, 8) == b"\x2a" + bytes(7)
    assert echo.read_config(1 << 20, 2) == b"\0\0"


async def test_the_generation_moves_with_the_devices_changes_only(echo: Echo) -> None:
    """R25."""
    async with rigged(echo) as rig:
        rig.start()
        before = echo.config.generation
        echo.write_config(2, b"abcdef")
        echo.change_config(level=7)
        assert (echo.config.generation, rig.config_interrupts) == (before, 0)
        echo.change_config(level=8)
        assert (echo.config.generation, rig.config_interrupts) == (before + 1, 1)
        with pytest.raises(InvalidError):
            echo.change_config(fixed=1)


def test_a_write_reaches_only_what_a_driver_may_write(echo: Echo) -> None:
    echo.write_config(0, b"\xff" * 16)
    assert echo.read_config(0, 16) == b"\x07\0" + b"\xff" * 10 + b"\x2a\0\0\0"
    assert echo.written == ["name", "early"]


async def test_an_init_field_is_fixed_from_driver_ok_on(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.start()
        echo.write_config(8, b"\1\0\0\0")
        assert echo.config.get("early") == 0


def test_the_latch_commits_the_written_bytes_and_no_other() -> None:
    """R25: write 1, write 3, latch: bytes 1 and 3 take effect, byte 2 does not."""
    echo = Echo(latch=True)
    echo.change_config(name=b"......")
    echo.write_config(2 + 1, b"A")
    echo.write_config(2 + 3, b"B")
    assert echo.config.get("name") == b"......"
    assert echo.written == []
    echo.commit_config()
    assert echo.config.get("name") == b".A.B.."
    assert echo.written == ["name"]
    echo.commit_config()
    assert echo.written == ["name"]


def test_the_latch_does_not_overwrite_what_the_device_changed_meanwhile() -> None:
    """R25."""
    echo = Echo(latch=True)
    echo.write_config(8, b"\1\2\3\4")
    echo.write_config(3, b"A")
    echo.change_config(name=b"device")
    echo.commit_config()
    assert echo.config.get("name") == b"device"
    assert echo.config.get("early") == 0x04030201


async def test_a_reset_forgets_uncommitted_writes() -> None:
    echo = Echo(latch=True)
    async with rigged(echo):
        echo.write_config(3, b"A")
        echo.set_status(0)
        echo.commit_config()
        assert echo.config.get("name") == bytes(6)


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.binary(min_size=1, max_size=8)), max_size=6
    )
)
def test_the_latch_and_direct_writes_end_in_the_same_bytes(
    writes: list[tuple[int, bytes]],
) -> None:
    """R25."""
    spaces = [ConfigSpace(FIELDS, latch=latch) for latch in (False, True)]
    for space in spaces:
        for offset, data in writes:
            space.write(offset, data, driver_ok=False)
    spaces[1].commit()
    assert spaces[0].read(0, 24) == spaces[1].read(0, 24)


async def test_statistics_tell_the_life(echo: Echo) -> None:
    async with rigged(echo) as rig:
        rig.start()
        await rig.request(0, b"x", 1)
        echo.fail("because")
        now = echo.statistics()
        assert (now.breaks, now.broken, now.interrupts) == (1, "because", 2)
        assert now.status == LIVE | Status.NEEDS_RESET
