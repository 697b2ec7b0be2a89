"""The north end against the south end, and against a device that breaks the rules."""

import itertools
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from ioq import Index, RingFault
from tests.frames import GSO, NEEDS_CSUM, TCP4, ether, tcp_frame
from tests.vbus.net.pair import Format, Pair
from vbus.net import BATCH, FrameBatch, HostEnd

FORMATS = [
    Format(sg=sg, pmtd=pmtd, txc=txc, l4ro=l4ro)
    for (sg, pmtd), txc, l4ro in itertools.product(
        ((False, False), (True, False), (True, True)), (False, True), (False, True)
    )
]


@pytest.fixture(
    params=FORMATS,
    ids=lambda f: (
        "-".join(n for n in ("sg", "pmtd", "txc", "l4ro") if getattr(f, n)) or "flat"
    ),
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


@pytest.fixture
def full() -> Iterator[Pair]:
    """With everything negotiated."""
    made = Pair()
    yield made
    made.close()


def plain(*frames: bytes) -> FrameBatch:
    batch = FrameBatch()
    batch.load([(frame, 0, 0, 0, 0, 0) for frame in frames])
    return batch


def taken(batch: FrameBatch) -> list[bytes]:
    return [batch.frame(n)[0] for n in range(len(batch))]


def test_frames_reach_the_host_in_order_and_room_comes_back(pair: Pair) -> None:
    """R15: many times around the ring and the arena, in every format."""
    batch = FrameBatch()
    sent = [ether(bytes([n % 256]) * (n * 37 % 1500)) for n in range(400)]
    got: list[bytes] = []
    left = sent
    while left:
        left = left[pair.pump.send(plain(*left[:BATCH]), 0, len(left[:BATCH])) :]
        assert pair.host.collect(batch) > 0
        got += taken(batch)
        pair.host.release()
    assert got == sent
    pair.guest.reap()
    assert pair.guest.in_flight == 0
    assert pair.pump.statistics().tx_frames == 400


def test_frames_reach_the_guest_in_order_and_buffers_go_back(pair: Pair) -> None:
    """R15: as often as one likes."""
    batch = FrameBatch()
    for turn in range(100):
        frames = [ether(bytes([turn, n]) * (n * 50)) for n in range(pair.form.count)]
        assert pair.host.deliver(plain(*frames), 0, len(frames)) == 0
        assert pair.pump.receive(batch) == len(frames)
        assert taken(batch) == frames
        pair.pump.done()
    assert pair.host._counters()[6] == 0  # none dropped


def test_a_gso_frame_crosses_both_ways_with_its_offload(full: Pair) -> None:
    """R15: 64 KiB in one piece up, in pages down."""
    frame, at = tcp_frame(bytes(range(256)) * 250)
    item = (frame, NEEDS_CSUM | GSO, TCP4, 1448, at, 16)
    batch, received = FrameBatch(), FrameBatch()
    for _ in range(20):
        batch.load([item])
        assert full.pump.send(batch, 0, 1) == 1
        assert full.host.collect(batch) == 1
        assert batch.frame(0) == item
        assert full.host.deliver(batch, 0, 1) == 0
        full.host.release()
        assert full.pump.receive(received) == 1
        assert received.frame(0) == item
        full.pump.done()


def test_a_full_arena_takes_no_frame_until_one_is_completed() -> None:
    """R15: a frame is never overwritten while the host may read it."""
    pair = Pair(Format(arena=65536 * 2))
    frame, at = tcp_frame(bytes(60000))
    batch = FrameBatch()
    batch.load([(frame, 3, TCP4, 1448, at, 16)] * 3)
    assert pair.pump.send(batch, 0, 3) == 2
    assert pair.guest.full
    seen = FrameBatch()
    assert pair.host.collect(seen) == 2
    assert taken(seen) == [frame, frame]
    pair.host.release()
    pair.guest.reap()
    assert not pair.guest.full
    pair.close()


@pytest.mark.parametrize("txc", [False, True])
async def test_room_wakes_a_sender_when_the_host_completes(txc: bool) -> None:
    """R12: without polling, by the ring's signal or by events."""
    pair = Pair(Format(txc=txc, count=4))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.pump.run, None)
        assert pair.pump.send(plain(*[ether(b"")] * 5), 0, 5) == 4
        waiting = trio.Event()

        async def wait() -> None:
            await pair.pump.room()
            waiting.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waiting.is_set()
        pair.host.collect(FrameBatch())
        pair.ring_guest(pair.host.release())
        with trio.fail_after(5):
            await waiting.wait()
        nursery.cancel_scope.cancel()
    pair.close()


def test_the_link_state_is_what_the_last_event_said(full: Pair) -> None:
    """R15 (7.7): unknown, up, down."""
    assert full.guest.link is None
    for up in (True, False, True):
        full.host.link_event(up)
        full.guest.reap()
        assert full.guest.link is up


def test_a_batch_that_outlived_its_memory_is_refused(full: Pair) -> None:
    """R50: an unmap between collect and deliver cannot crash the host."""
    full.pump.send(plain(ether(b"")), 0, 1)
    batch = FrameBatch()
    assert full.host.collect(batch) == 1
    full.south.clear()
    with pytest.raises(RuntimeError, match="outlived"):
        full.host.deliver(batch, 0, 1)
    with pytest.raises(RuntimeError, match="outlived"):
        batch.frame(0)
    with pytest.raises(RingFault, match="unmapped"):
        full.host.collect(batch)


def test_stretches_outside_a_batch_are_refused(full: Pair) -> None:
    """Misuse is an IndexError, not memory."""
    batch = plain(ether(b""))
    for first, count in ((0, 2), (1, 1), (2, 0), (2**32 - 1, 2)):
        with pytest.raises(IndexError):
            full.host.deliver(batch, first, count)
    with pytest.raises(OverflowError):
        full.host.deliver(batch, 0, -1)
    with pytest.raises(TypeError):
        full.host.deliver(None, 0, 1)  # type: ignore[arg-type]


def test_an_end_without_parts_does_nothing() -> None:
    """A connection whose rings are not shared yet, or not any more."""
    end = HostEnd(1500, 10)
    end.set_up(True)
    batch = plain(ether(b""))
    assert end.collect(FrameBatch()) == 0
    assert end.deliver(batch, 0, 1) == 0
    assert end.flush_rx() == end.flush_events() == end.release() == end.signal_rx() == 0
    assert end._counters()[6] == 1


def _spoil(pair: Pair, layout: str, offset: int, *values: int) -> None:
    """Write into L4RO slot 0, as a hostile device does after it filled it."""
    pair.views["rx_pool"].write(offset, struct.pack(layout, *values))


BAD_SLOTS = {
    "rx-count": ("<I", 28, 100),
    "rx-length": ("<I", 12, 61),
    "rx-page": ("<Q", 32 + 16 + 8, 4096),
}


@pytest.mark.parametrize("reason", BAD_SLOTS)
def test_a_hostile_device_faults_the_ring_of_the_guest(full: Pair, reason: str) -> None:
    """R12: the guest trusts the device no more than the other way round."""
    frame, at = tcp_frame(bytes(3000))
    batch = FrameBatch()
    batch.load([(frame, 3, TCP4, 1448, at, 16)])
    full.host.deliver(batch, 0, 1)
    _spoil(full, *BAD_SLOTS[reason])
    with pytest.raises(RingFault) as caught:
        full.pump.receive(batch)
    assert caught.value.reason == reason


def test_a_page_cannot_be_handed_back_twice(full: Pair) -> None:
    """R12: else two frames would share it."""
    frame, at = tcp_frame(bytes(3000))
    batch = FrameBatch()
    batch.load([(frame, 3, TCP4, 1448, at, 16)] * 2)
    full.host.deliver(batch, 0, 2)
    first = full.views["rx_pool"].read(32 + 16, 16)
    full.views["rx_pool"].write(320 + 32 + 16, first)
    with pytest.raises(RingFault, match="rx-page"):
        full.pump.receive(batch)


def test_completions_of_nothing_are_counted_and_ignored(full: Pair) -> None:
    """R12: unknown ids, foreign cookies, the same one twice."""
    full.pump.send(plain(ether(b""), ether(b"")), 0, 2)
    pool, ring = full.views["event_pool"], full.host_rings["events"]
    for at, (kind, cookie) in enumerate([(1, 7), (9, 0), (1, 2**63), (1, 1), (1, 1)]):
        pool.write(24 * at, struct.pack("<IIIIQ", 0, 24, kind, 0, cookie))
        it = ring.iterator(Index.INUSE)
        it.seek_tail()
        it.push()
    full.guest.reap()
    assert full.guest.in_flight == 2  # 1 is done, but 0 goes before it
    assert full.pump.statistics().bad_events == 4


def test_parts_that_do_not_fit_are_refused() -> None:
    """Misuse of GuestEnd is named."""
    from vbus.net import GuestEnd

    end = GuestEnd(True, True, 4096)
    with pytest.raises(ValueError, match="needed"):
        end.post()
    with pytest.raises(RuntimeError, match="post"):
        end.reap()
    pair = Pair()
    with pytest.raises(ValueError, match="already"):
        pair.guest.post()
    with pytest.raises(ValueError, match="no part"):
        pair.guest.attach("nothing", pair.views["arena"])
    with pytest.raises(AttributeError):
        pair.guest.attach("arena", None)  # type: ignore[arg-type]
    pair.close()
