"""Frames through the rings of a venet, in every format, against a driver in Python."""

import itertools

import pytest

from tests.backends.driver import Modes
from tests.backends.stage import LOOPBACK, TWO_PORTS, staged
from tests.frames import (
    ACK,
    CWR,
    FIN,
    GSO,
    NEEDS_CSUM,
    PSH,
    TCP4,
    TCP6,
    ether,
    segments,
    tcp_frame,
)

SG, TSO4, TSO6, TSO_ECN, PMTD = 1, 2, 4, 8, 32
TX_MODES = {"flat": 0, "sg": 0x0F, "sg-pmtd": 0x2F}
RX_MODES = {"flat": 0, "l4ro": 0x0F}
EVENT_MODES = {"none": 0, "linkstate": 1, "txc": 2, "both": 3}

every_mode = pytest.mark.parametrize(
    "modes",
    [
        pytest.param(Modes(sg=tx, l4ro=rx, events=events), id=f"{a}-{b}-{c}")
        for (a, tx), (b, rx), (c, events) in itertools.product(
            TX_MODES.items(), RX_MODES.items(), EVENT_MODES.items()
        )
    ],
)


@every_mode
async def test_frames_cross_in_order_and_unchanged_round_after_round(
    modes: Modes,
) -> None:
    """R15: more frames than descriptors, sizes from 14 to the MTU, all completed."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=modes)
        completed = 0
        if modes.events & 1:
            assert [event[:12] for event in driver.take_events()] == [
                bytes.fromhex("00000000 10000000 00000000")
            ]
        for turn in range(3 * modes.count):
            size = (turn * 101) % (modes.mtu + 1)
            frame = ether(bytes([turn]) * size)
            driver.send(frame)
            await stage.settle()
            (got,) = driver.receive()
            assert got.data == frame
            completed += len(driver.take_events()) if modes.txc else driver.reap()
        assert completed == 3 * modes.count
        counters = stage.device("loop0").statistics()
        assert (counters.tx_frames, counters.rx_frames) == (completed, completed)
        assert not stage.failures()


@every_mode
async def test_a_full_ring_of_frames_is_served_at_once(modes: Modes) -> None:
    """R6: one doorbell, one batch, one notification for all of it."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=modes)
        if modes.events & 1:
            driver.take_events()
        frames = [ether(bytes([n]) * 64) for n in range(modes.count)]
        for frame in frames:
            driver.send(frame, cuts=(20,), inject=False)
        before = driver.rx.doorbell.statistics().rings
        driver.tx.ring.signal.inject()
        await stage.settle()
        assert [got.data for got in driver.receive()] == frames
        assert driver.rx.doorbell.statistics().rings == before + 1
        done = len(driver.take_events()) if modes.txc else driver.reap()
        assert done == modes.count


@pytest.mark.parametrize("sg", [0x0F, 0x2F])
async def test_a_gso_frame_crosses_whole_to_a_guest_that_takes_it(sg: int) -> None:
    """R15: 64 KiB unsegmented, with its offload fields, in pages of the page queue."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=sg, events=3))
        receiver = await stage.driver(1, Modes(l4ro=0x0F))
        frame, at = tcp_frame(bytes(range(256)) * 200, flags=ACK | PSH)
        sender.send(
            frame,
            flags=NEEDS_CSUM | GSO,
            csum=(at, 16),
            gso=(TCP4, 54, 1448),
            cuts=(54, 4000, 30000),
        )
        await stage.settle()
        (got,) = receiver.receive()
        assert got.data == frame
        assert got.flags == NEEDS_CSUM | GSO
        assert got.csum == (at, 16)
        assert got.gso == (TCP4, 54, 1448)
        assert got.iovs == 1 + -(-(len(frame) - 1514) // 4096)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("l4ro", [0, 1], ids=["flat", "l4ro-without-tso"])
async def test_a_gso_frame_is_cut_for_a_guest_that_cannot_take_it(
    six: bool, l4ro: int
) -> None:
    """R15: segments as the oracle makes them; FIN, PSH, CWR where they belong."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=0x0F))
        receiver = await stage.driver(1, Modes(l4ro=l4ro))
        payload = bytes(range(251)) * 40
        frame, at = tcp_frame(payload, six=six, flags=ACK | PSH | FIN | CWR)
        kind = TCP6 if six else TCP4
        sender.send(frame, flags=NEEDS_CSUM | GSO, csum=(at, 16), gso=(kind, 54, 1400))
        await stage.settle()
        wanted = segments(frame, at, 1400, six=six)
        got = receiver.receive()
        if l4ro:
            assert [each.flags for each in got] == [NEEDS_CSUM] * len(wanted)
            strip = slice(at + 16, at + 18)  # the guest computes it
            for each, segment in zip(got, wanted, strict=True):
                assert each.csum == (at, 16)
                assert each.data[: strip.start] == segment[: strip.start]
                assert each.data[strip.stop :] == segment[strip.stop :]
        else:
            assert [each.data for each in got] == wanted
        assert stage.device("port1").statistics().segmented == 1


async def test_a_checksum_is_computed_for_a_flat_guest() -> None:
    """R15: NEEDS_CSUM does not get lost on the way to a guest without offload."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=0x0F))
        receiver = await stage.driver(1)
        partial, at = tcp_frame(b"odd number of bytes")
        whole, _ = tcp_frame(b"odd number of bytes", partial=False)
        sender.send(partial, flags=NEEDS_CSUM, csum=(at, 16), cuts=(54, 61))
        await stage.settle()
        assert [got.data for got in receiver.receive()] == [whole]
        assert stage.device("port1").statistics().checksummed == 1


async def test_a_full_rx_ring_drops_and_recovers() -> None:
    """R15: nothing waits for a guest that does not take its frames."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0)
        receiver = await stage.driver(1, Modes(count=4))
        for number in range(6):
            sender.send(ether(bytes([number])))
        await stage.settle()
        assert [got.data[14] for got in receiver.receive()] == [0, 1, 2, 3]
        assert stage.device("port1").statistics().rx_dropped == 2
        sender.send(ether(b"\x09"))
        await stage.settle()
        assert [got.data[14] for got in receiver.receive()] == [9]


async def test_an_empty_page_queue_drops_large_frames_only() -> None:
    """R15 (7.6): no page, no wait; a frame that fits the linear part still goes."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=0x0F))
        receiver = await stage.driver(1, Modes(l4ro=0x0F, pages=2))
        frame, at = tcp_frame(bytes(12000))
        for _ in range(2):  # the first needs three pages of two
            sender.send(frame, flags=3, csum=(at, 16), gso=(TCP4, 54, 1448))
        sender.send(ether(b"small"))
        await stage.settle()
        assert [got.data for got in receiver.receive()] == [ether(b"small")]
        assert stage.device("port1").statistics().rx_dropped == 2


async def test_a_slot_never_gets_more_iovs_than_it_has_room_for() -> None:
    """R51 (12.1): (len - 32) / 16, not the host's constant."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=0x0F))
        receiver = await stage.driver(1, Modes(l4ro=0x0F, count=2))
        it = receiver.rx.ring.iterator()
        it.seek_set(0)
        ring = receiver.rx.view
        ring.write(56 + 16, (80).to_bytes(8, "little"))  # slot 0: room for 3 iovs
        second = receiver.rx_pool.view.read(80, 224)
        for size in (1514 + 2 * 4096, 1515 + 2 * 4096):
            frame, at = tcp_frame(bytes(size - 54))
            sender.send(frame, flags=3, csum=(at, 16), gso=(TCP4, 54, 1448))
            await stage.settle()
            if size == 1514 + 2 * 4096:
                (got,) = receiver.receive()
                assert got.iovs == 3
                ring.write(56 + 32 + 16, (80).to_bytes(8, "little"))
        assert receiver.receive() == []
        assert receiver.rx_pool.view.read(80, 224) == second
        assert stage.device("port1").statistics().rx_dropped == 1


async def test_completions_that_find_the_event_ring_full_come_later() -> None:
    """R15 (7.7): kept in a list; the guest's pop makes the host go on."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(events=2, count=4))
        sent = 0
        for _ in range(3):
            for _ in range(4):
                driver.send(ether(bytes([sent])))
                sent += 1
            await stage.settle()
            driver.receive()
        events: list[bytes] = []
        while found := driver.take_events():
            events += found
            await stage.settle()
        assert len(events) == sent
        assert stage.device("loop0").statistics().deferred_events > 0
