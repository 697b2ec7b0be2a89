"""Guests that break the rules of ABI 7.4, and rings that cannot be right.

A bad packet is dropped, counted and completed; a bad ring ends its own connection.
"""

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.venet.switch import Port
from ioq import RingFault
from tests.backends.driver import COOKIE, SLOT, Modes
from tests.backends.stage import LOOPBACK, TWO_PORTS, staged
from tests.frames import GSO, NEEDS_CSUM, TCP4, TCP6, UDP, ether, tcp_frame
from vbus.connection import Ended

LENGTH, FRAME = "tx_length_errors", "tx_frame_errors"
OUTSIDE = 0xDEAD_0000_0000

BAD_SG = {
    "sum of iovs too small": ((100, [(50, 0)]), {}, LENGTH),
    "sum of iovs too large": ((100, [(50, 0), (51, 50)]), {}, LENGTH),
    "sum of iovs wraps": ((100, [(0xFFFFFFFF, 0), (101, 0)]), {}, LENGTH),
    "longer than the MTU": ((1515, [(1515, 0)]), {}, LENGTH),
    "GSO over 64 KiB": ((65537, [(65537, 0)]), {"flags": 3}, LENGTH),
    "shorter than a header": ((13, [(13, 0)]), {}, LENGTH),
    "no fragment": ((0, []), {"size": 48}, LENGTH),
    "more iovs than the size": ((100, [(100, 0)]), {"count": 2}, LENGTH),
    "iov count overflows": ((100, [(100, 0)]), {"count": 0x1000_0000}, LENGTH),
    "size below one iov": ((100, [(100, 0)]), {"size": 47}, LENGTH),
    "size over the limit": ((100, [(100, 0)]), {"size": 321}, LENGTH),
    "size near 2^64": ((100, [(100, 0)]), {"size": 2**64 - 1}, LENGTH),
    "payload outside memory": ((100, [(100, OUTSIDE)]), {}, LENGTH),
    "payload wraps": ((100, [(100, 2**64 - 50)]), {}, LENGTH),
    "GSO without a size": ((100, [(100, 0)]), {"flags": 3}, FRAME),
    "GSO of UDP": ((100, [(100, 0)]), {"flags": 3, "gso": (UDP, 0, 90)}, FRAME),
    "GSO of unknown type": ((100, [(100, 0)]), {"flags": 3, "gso": (9, 0, 9)}, FRAME),
    "GSO of no TCP": ((100, [(100, 0)]), {"flags": 3, "gso": (TCP4, 0, 9)}, FRAME),
    "checksum outside": ((60, [(60, 0)]), {"flags": 1, "csum": (50, 9)}, FRAME),
    "checksum far outside": (
        (60, [(60, 0)]),
        {"flags": 1, "csum": (65535, 65535)},
        FRAME,
    ),
    "checksum in addresses": ((60, [(60, 0)]), {"flags": 1, "csum": (0, 4)}, FRAME),
}


@pytest.mark.parametrize("mode", [0x0F, 0x2F], ids=["sg", "pmtd"])
@pytest.mark.parametrize("name", BAD_SG)
async def test_a_bad_venet_sg_is_dropped_counted_and_completed(
    name: str, mode: int
) -> None:
    """R51 (7.4): the connection goes on with the next packet."""
    (length, iovs), fields, counter = BAD_SG[name]
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(sg=mode, events=2))
        base = driver.place(bytes(70000 if length > 60000 else 2048))
        placed = [(size, ptr if ptr >= OUTSIDE else base + ptr) for size, ptr in iovs]
        driver.send_sg(length, placed, **fields)
        driver.send(ether(b"next"))
        await stage.settle()
        assert [got.data for got in driver.receive()] == [ether(b"next")]
        statistics = stage.device("loop0").statistics()
        assert getattr(statistics, counter) == 1
        assert statistics.tx_frames == 1
        assert [event[16:] for event in driver.take_events()] == [
            (COOKIE + at).to_bytes(8, "little") for at in range(2)
        ]
        assert not stage.failures()


async def test_a_descriptor_beyond_the_pool_is_dropped() -> None:
    """R51 (12.2): a Linux guest with one fragment too many in its last slot."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(sg=0x2F))
        for ptr in (SLOT * 15, SLOT * 16, 2**64 - 8):
            driver.push_tx(ptr, SLOT + 16)
        driver.send(ether(b"next"))
        await stage.settle()
        assert len(driver.receive()) == 1
        assert driver.reap() == 4
        assert stage.device("loop0").statistics().tx_length_errors == 3


@pytest.mark.parametrize(
    ("ptr", "length"), [(0, 13), (0, 1515), (OUTSIDE, 60), (0, 2**63)]
)
async def test_a_bad_flat_descriptor_is_dropped(ptr: int, length: int) -> None:
    """R51 (7.3)."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver()
        driver.push_tx(ptr or driver.place(bytes(2000)), length)
        driver.send(ether(b"next"))
        await stage.settle()
        assert len(driver.receive()) == 1
        assert driver.reap() == 2
        assert stage.device("loop0").statistics().tx_length_errors == 1


@pytest.mark.parametrize("caps", [0x01, 0x05, 0x03])
async def test_gso_that_was_not_negotiated_is_dropped(caps: int) -> None:
    """R51: TCPv4 without TSO4, TCPv6 without TSO6, ECN without ECN."""
    six = caps == 0x03
    frame, at = tcp_frame(bytes(3000), six=six)
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(sg=caps))
        gso = (TCP6 if six else TCP4, 54, 1000)
        driver.send(frame, flags=NEEDS_CSUM | GSO, csum=(at, 16), gso=gso)
        await stage.settle()
        assert stage.device("loop0").statistics().tx_frame_errors == 1


async def test_the_checked_header_is_the_one_delivered() -> None:
    """R51: addresses come from the copy that the switch decided on.

    The guest rewrites its frame, as from another CPU, between check and delivery.
    """
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0)
        receiver = await stage.driver(1)
        switch = stage.device("lan0")
        frame = ether(b"payload", by=sender.mac, to=receiver.mac)
        at = sender.place(frame)
        judge = switch._judge

        def judge_slowly(source: Port, to: bytes, by: bytes) -> object:
            decision = judge(source, to, by)
            sender.peer.memory.write(at, ether(b"", to=b"\xff" * 6, by=receiver.mac))
            return decision

        switch._judge = judge_slowly
        sender.push_tx(at, len(frame))
        await stage.settle()
        assert [got.data for got in receiver.receive()] == [frame]


RX_FAULTS = {
    "rx-buffer": (0, lambda d: d.rx.view.write(56 + 8, OUTSIDE.to_bytes(8, "little"))),
    "rx-slot": (0x0F, lambda d: d.rx.view.write(56 + 8, (2**63).to_bytes(8, "little"))),
    "page-length": (0x0F, lambda d: d.pages.view.write(56 + 16, bytes(8))),
    "inuse-tail-moved": (0, lambda d: d.rx.view.write(40, b"\x03\0\0\0")),
    "inuse-head-range": (0, lambda d: d.rx.view.write(36, b"\xff\xff\xff\xff")),
}


@pytest.mark.parametrize("reason", RX_FAULTS)
async def test_a_broken_rx_side_ends_only_that_connection(reason: str) -> None:
    """R51: the sender, who did nothing wrong, goes on."""
    l4ro, spoil = RX_FAULTS[reason]
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0, Modes(sg=0x0F))
        victim = await stage.driver(1, Modes(l4ro=l4ro))
        spoil(victim)
        frame, at = tcp_frame(bytes(5000))
        sender.send(frame, flags=3, csum=(at, 16), gso=(TCP4, 54, 1448))
        await stage.settle()
        (failure,) = stage.failures()
        assert isinstance(failure, RingFault)
        assert failure.reason == reason
        (closed,) = stage.effects.closed
        assert (closed[0].handle, closed[1]) == (victim.handle, Ended.FAILED)
        sender.send(ether(b"x"))
        await stage.settle()
        assert sender.reap() == 2


@pytest.mark.parametrize("what", ["event-bounds", "inuse-head-moved"])
async def test_a_broken_tx_side_ends_only_that_connection(what: str) -> None:
    """R51: the event ring's offsets and the TX ring's indices are the guest's."""
    async with staged(TWO_PORTS) as stage:
        bad = await stage.driver(0, Modes(events=2))
        good = await stage.driver(1)
        if what == "event-bounds":
            bad.events.view.write(56 + 8, (24 * 16 - 23).to_bytes(8, "little"))
        else:
            bad.tx.view.write(36, b"\x05\0\0\0")
        bad.send(ether(b"x"))
        await stage.settle()
        (failure,) = stage.failures()
        assert isinstance(failure, RingFault)
        assert failure.reason == what
        good.send(ether(b"x", by=good.mac))
        await stage.settle()
        assert good.reap() == 1


async def test_completions_nobody_takes_stop_the_sender_not_the_host() -> None:
    """R51: the list of completions is bounded, and goes on when there is room."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(events=2, count=64))
        sent = 0
        it = driver.tx.ring.iterator(1)
        while sent < 20000:
            it.seek_tail()
            if it.owner != 0:
                break
            driver.send(ether(b""), inject=sent % 64 == 63)
            sent += 1
            if sent % 64 == 0:
                await stage.settle()
        assert 8192 <= sent < 20000
        done = 0
        while found := driver.take_events():
            done += len(found)
            await stage.settle()
        assert done == sent


words = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 14, 48, 304, 320, 2**32])
small = st.integers(0, 400) | st.integers(0, 2**32 - 1)
half = st.integers(0, 120) | st.integers(0, 65535)


@given(
    descriptors=st.lists(
        st.tuples(
            small, small, half, half, st.sampled_from([0, 1, 2, 7]), half, half,
            st.integers(0, 20) | small, st.lists(st.tuples(small, words), max_size=18),
            words,
        ),
        min_size=1, max_size=12,
    ),
    rx=st.sampled_from([0, 1, 0x0F]),
    pmtd=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_venet_sg_is_completed_or_ends_the_connection(
    descriptors: list[tuple[object, ...]], rx: int, pmtd: bool
) -> None:
    """R51: whatever is in the descriptor; nothing outside our rules comes out."""

    async def play() -> None:
        async with staged(TWO_PORTS) as stage:
            sender = await stage.driver(0, Modes(sg=0x2F if pmtd else 0x0F, events=2))
            receiver = await stage.driver(1, Modes(l4ro=rx))
            base = sender.place(tcp_frame(bytes(4000))[0])
            for *fields, iovs, size in descriptors:
                length, flags, start, offset, kind, hdr, gso, count = fields
                placed = [(n, base if ptr % 3 else ptr) for n, ptr in iovs]
                length = sum(n for n, _ in placed) if length % 4 else length
                sender.send_sg(
                    length & 0xFFFFFFFF,
                    placed,
                    flags,
                    (start, offset),
                    (kind, hdr, gso),
                    size=size if size % 2 else None,
                    count=count if count % 2 else None,
                )
            await stage.settle()
            assert not stage.failures()
            assert len(sender.take_events()) == len(descriptors)
            for got in receiver.receive():
                assert len(got.data) >= 14
                assert len(got.data) <= 65536
            statistics = stage.device("port0").statistics()
            total = statistics.tx_frames + statistics.tx_length_errors
            assert total + statistics.tx_frame_errors == len(descriptors)

    trio.run(play)
