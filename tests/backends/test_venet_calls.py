"""The functions and shared memory of a venet: ABI 7.1, 7.2, 7.9, with exact errnos."""

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from backends.venet import session
from ioq import Ring, ring_size
from tests.backends.driver import SLOT, Driver, Modes
from tests.backends.stage import LOOPBACK, TWO_PORTS, Stage, staged
from tests.frames import ether
from vbus.abi import NO_SIGNAL
from vbus.errors import BusyError, ExistsError, InvalidError
from vbus.testing import Shared

LINKUP, LINKDOWN, MACQUERY, NEGCAP, FLUSHRX, PMTDQUERY, EVQQUERY, L4ROQUERY = range(8)


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        yield
    assert caught.value.errno == number


async def opened(stage: Stage) -> int:
    return await stage.peer.open(0)


def formatted_ring(stage: Stage, id: int, count: int) -> Shared:
    """A ring in guest memory, not shared yet, of any size."""
    size = ring_size(count)
    addr = stage.peer.allocate(size)
    view = stage.peer.memory.view(addr, size)
    Ring.format(view, count)
    return Shared(id, addr, view)


def negcap(group: int, bits: int) -> bytes:
    return struct.pack("<II", group, bits)


@pytest.mark.parametrize(
    ("group", "asked", "granted"),
    [(0, 0xFFFFFFFF, 0x2F), (1, 0xFF, 3), (2, 0x2F, 0x0F), (0, 1, 1), (9, 5, 0)],
)
async def test_negcap_grants_what_is_asked_and_offered(
    group: int, asked: int, granted: int
) -> None:
    """R15: an unknown group is no error, it grants nothing."""
    async with staged(LOOPBACK) as stage:
        handle = await opened(stage)
        result = await stage.peer.call(handle, NEGCAP, negcap(group, asked))
        assert result == (0, negcap(group, granted))


async def test_a_device_without_offload_offers_events_only() -> None:
    """R15: the flat format for ever."""
    async with staged({"loop0": ("venet-loopback", {"offload": False})}) as stage:
        handle = await opened(stage)
        for group, granted in ((0, 0), (1, 3), (2, 0)):
            _, after = await stage.peer.call(handle, NEGCAP, negcap(group, 0x2F))
            assert after == negcap(group, granted)


async def test_queries_answer_the_golden_vectors() -> None:
    """R15: 11.11, EVQQUERY and L4ROQUERY; PMTDQUERY gives the id in its result."""
    async with staged(LOOPBACK) as stage:
        handle = await opened(stage)
        call = stage.peer.call
        evq = bytes.fromhex("0000000018000000 6500000066000000") + bytes(16)
        l4ro = bytes.fromhex("0000000067000000 6800000000000000") + bytes(16)
        assert await call(handle, EVQQUERY, bytes(32)) == (0, evq)
        assert await call(handle, L4ROQUERY, bytes(32)) == (0, l4ro)
        assert await call(handle, PMTDQUERY) == (100, b"")


async def test_events_are_the_golden_vectors() -> None:
    """R15: 11.11, LINKSTATE up in LINKUP, and TXC with the descriptor's cookie."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver(modes=Modes(events=3))
        up = bytes.fromhex("00000000 10000000 00000000 01000000")
        assert driver.take_events() == [up]
        driver.send(ether(b""))
        await stage.settle()
        txc = bytes.fromhex("00000000 18000000 01000000 00000000 00000000 8088ffff")
        assert driver.take_events() == [txc]


async def test_the_mac_is_the_attribute_and_stays_while_open() -> None:
    """R15, 9.3: made from the device's name if not given."""
    async with staged(LOOPBACK) as stage:
        device = stage.device("loop0")
        first = device.get_attribute("client_mac")
        assert int(first[:2], 16) & 3 == 2
        device.set_attribute("client_mac", "52:54:00:12:34:56")
        handle = await opened(stage)
        assert await stage.peer.call(handle, MACQUERY, bytes(6)) == (
            0,
            bytes.fromhex("525400123456"),
        )
        with refused(errno.EINVAL):
            await stage.peer.call(handle, MACQUERY, bytes(7))
        with pytest.raises(BusyError):
            device.set_attribute("client_mac", first)
        for wrong in ("52:54:00:12:34", "ff:ff:ff:ff:ff:ff", "no", "525400123456"):
            with pytest.raises(InvalidError):
                device._declared("client_mac").parse(wrong)


async def test_a_new_address_is_reserved_at_the_switch() -> None:
    """R51: and another port's is refused."""
    async with staged(TWO_PORTS) as stage:
        port0, port1 = stage.device("port0"), stage.device("port1")
        with pytest.raises(ExistsError):
            port1.set_attribute("client_mac", port0.get_attribute("client_mac"))
        before = port0.get_attribute("client_mac")
        port0.set_attribute("client_mac", "02:00:00:00:00:77")
        port1.set_attribute("client_mac", before)
        with pytest.raises(ExistsError):
            port0.set_attribute("client_mac", before)
        assert port0.get_attribute("client_mac") == "02:00:00:00:00:77"


async def test_wrong_lengths_flags_and_functions_are_refused() -> None:
    """R4."""
    async with staged(LOOPBACK) as stage:
        handle = await opened(stage)
        for func, data in (
            (NEGCAP, bytes(7)),
            (EVQQUERY, bytes(31)),
            (EVQQUERY, b"\1" + bytes(31)),
            (L4ROQUERY, bytes(33)),
            (L4ROQUERY, b"\1" + bytes(31)),
            (8, b""),
            (LINKUP, b""),
        ):
            with refused(errno.EINVAL):
                await stage.peer.call(handle, func, data)
        with refused(errno.ENOENT):
            await stage.peer.call(handle, LINKDOWN)


async def test_what_is_negotiated_stays_while_the_link_is_up() -> None:
    """R15."""
    async with staged(LOOPBACK) as stage:
        driver = await stage.driver()
        call = stage.peer.call
        for func, data in (
            (NEGCAP, negcap(0, 1)),
            (EVQQUERY, bytes(32)),
            (L4ROQUERY, bytes(32)),
        ):
            with refused(errno.EINVAL):
                await call(driver.handle, func, data)
        with refused(errno.EEXIST):
            await call(driver.handle, LINKUP)
        await call(driver.handle, LINKDOWN)
        with refused(errno.ENOENT):
            await call(driver.handle, LINKDOWN)
        assert await call(driver.handle, NEGCAP, negcap(0, 0)) == (0, negcap(0, 0))


async def test_shared_memory_is_checked_as_the_table_says() -> None:
    """R5, 7.1: ids, signals, what has to be negotiated, what comes first, twice."""
    async with staged(LOOPBACK) as stage:
        handle, peer = await opened(stage), stage.peer
        for id in (100, 101, 103):  # not negotiated
            with refused(errno.EINVAL):
                await peer.share(handle, id, SLOT)
        for group in (0, 1, 2):
            await peer.call(handle, NEGCAP, negcap(group, 0x2F))
        for id in (0, 1, 104):  # a ring needs its signal
            with refused(errno.EINVAL):
                await peer.share(handle, id, 88, signal_offset=None)
        for id in (100, 101, 103):  # a pool must not have one
            with refused(errno.EINVAL):
                await peer.share(handle, id, 4800, signal_offset=0)
        for id in (2, 99, 105, 0xFFFFFFFF):
            with refused(errno.EINVAL):
                await peer.share(handle, id, 64)
        with refused(errno.EINVAL):
            await peer.share_ring(handle, 102, 16)  # its pool comes first
        await peer.share(handle, 101, 24 * 16)
        for count in (15, 17):
            with refused(errno.EINVAL):
                await peer.share_ring(handle, 102, count)
        with refused(errno.EINVAL):
            await peer.share(handle, 103, 2048 * 320 + 1)
        await peer.share(handle, 103, 2048 * 320)
        await peer.share(handle, 100, SLOT)
        for id in (0, 1, 102, 104):
            await peer.share_ring(handle, id, 16)
            with refused(errno.EEXIST):
                await peer.share_ring(handle, id, 16)
        for id in (100, 101, 103):
            with refused(errno.EEXIST):
                await peer.share(handle, id, SLOT)
        assert NO_SIGNAL not in [shared.handle for shared in peer.shared.values()]


@pytest.mark.parametrize("l4ro", [0, 0x0F])
@pytest.mark.parametrize("up", [True, False])
async def test_flushrx_gives_every_buffer_back_without_a_signal(
    l4ro: int, up: bool
) -> None:
    """R15: also with the link down (12.1); the buffers work again afterwards."""
    async with staged(LOOPBACK) as stage:
        driver = Driver(stage.peer, 0, Modes(l4ro=l4ro, count=8))
        await driver.start(up=up)
        await stage.settle()
        driver.send(ether(b"before"))
        await stage.settle()
        if up:
            assert [got.data for got in driver.receive()] == [ether(b"before")]
        before = driver.rx.doorbell.statistics().rings
        assert await stage.peer.call(driver.handle, FLUSHRX) == (0, b"")
        assert driver.flushed() == 8
        assert stage.device("loop0").statistics().flushed == 8
        stage.peer.take_events()
        assert driver.rx.doorbell.statistics().rings == before
        if up:
            driver.send(ether(b"after"))
            await stage.settle()
            assert [got.data for got in driver.receive()] == [ether(b"after")]


async def test_flushrx_before_any_ring_is_shared_is_fine() -> None:
    """R15: a negative result is fatal to the Linux driver (12.1)."""
    async with staged(LOOPBACK) as stage:
        handle = await opened(stage)
        assert await stage.peer.call(handle, FLUSHRX) == (0, b"")


async def test_rings_go_on_where_they_were_after_down_and_up() -> None:
    """R15, 7.9: nothing is sent or received meanwhile; descriptors stay."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0)
        receiver = await stage.driver(1, Modes(events=1))
        for turn in range(3):
            sender.send(ether(bytes([turn])))
            await stage.settle()
            assert [got.data for got in receiver.receive()] == [ether(bytes([turn]))]
            await stage.peer.call(receiver.handle, LINKDOWN)
            sender.send(ether(b"lost"))
            receiver.send(ether(b"waits", to=b"\xff" * 6, by=receiver.mac))
            await stage.settle()
            assert receiver.receive() == []
            assert sender.receive() == []
            await stage.peer.call(receiver.handle, LINKUP)
            await stage.settle()
            assert [got.data[14:] for got in sender.receive()] == [b"waits"]
            assert receiver.reap() == 1
        assert len(receiver.take_events()) == 4
        assert stage.device("port1").statistics().rx_dropped == 3


async def test_a_closed_device_opens_again_from_scratch() -> None:
    """R3: nothing of the old connection is left, but the counters go on."""
    async with staged(LOOPBACK) as stage:
        for turn in range(3):
            driver = await stage.driver(modes=Modes(sg=0x2F, events=3, l4ro=0x0F))
            driver.send(ether(b"x"))
            await stage.settle()
            assert len(driver.receive()) == 1
            await stage.peer.close_device(driver.handle)
            await stage.settle()
            assert stage.device("loop0").statistics().tx_frames == turn + 1
            assert not stage.device("loop0").statistics().link_up
        assert not stage.failures()


async def test_rx_is_signalled_again_after_linkup(autojump_clock: object) -> None:
    """R15, 12.2: the Linux driver loses a notification between LINKUP and polling."""
    async with staged(TWO_PORTS) as stage:
        sender = await stage.driver(0)
        receiver = await stage.driver(1)
        sender.send(ether(b"early"))
        await stage.settle()
        stage.peer.take_events()
        lost = receiver.rx.doorbell.drain()
        assert lost
        await trio.sleep(2 * session.NUDGE_S)
        stage.peer.take_events()
        assert receiver.rx.doorbell.drain() == 1
        assert [got.data for got in receiver.receive()] == [ether(b"early")]
        await trio.sleep(20 * session.NUDGE_S)
        stage.peer.take_events()
        assert receiver.rx.doorbell.drain() == 0
