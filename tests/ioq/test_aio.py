"""Rings under trio: nobody sleeps on work, nobody is woken without need."""

from array import array
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from ioq import AdaptiveSpin, Index, Ring, RingConsumer, RingFault, RingProducer
from shm import Doorbell, Locality
from tests.ioq.memory import BUFFERS, Guest

NORTH, SOUTH = Locality
SLOTS = (BUFFERS, 64)


class Link:
    """A ring from north to south, with a doorbell at each end."""

    def __init__(self, count: int, spin: AdaptiveSpin | None = None) -> None:
        self.guest = Guest(count)
        self.bells = {me: Doorbell() for me in Locality}
        self.north = self.guest.end(NORTH, self.bells[SOUTH].ring)
        self.south = self.guest.end(SOUTH, self.bells[NORTH].ring)
        self.producer = RingProducer(self.north, self.bells[NORTH], spin)
        self.consumer = RingConsumer(self.south, self.bells[SOUTH], spin)

    async def receive(self, limit: int = 64) -> list[bytes]:
        into, sizes = bytearray(1 << 16), array("I", [0] * limit)
        taken = await self.consumer.receive(into, sizes)
        out, at = [], 0
        for size in sizes[:taken]:
            out.append(bytes(into[at : at + size]))
            at += size
        return out

    def close(self) -> None:
        for bell in self.bells.values():
            bell.close()
        self.guest.close()


@pytest.fixture(params=[None, 20.0], ids=["no spin", "spin"])
async def link(request: pytest.FixtureRequest) -> AsyncIterator[Link]:
    spin = AdaptiveSpin(request.param) if request.param else None
    link = Link(4, spin)
    yield link
    link.close()


@pytest.fixture
async def plain() -> AsyncIterator[Link]:
    link = Link(4)
    yield link
    link.close()


async def test_a_message_that_lies_there_is_taken_at_once(link: Link) -> None:
    await link.producer.send(b"hello", 5, slots=SLOTS)
    assert await link.receive() == [b"hello"]
    assert link.consumer.statistics().sleeps == 0
    assert link.bells[SOUTH].drain() == 0


async def test_a_sleeping_consumer_is_woken_by_one_doorbell(plain: Link) -> None:
    """R6: messages that come before it has drained ring no further doorbell."""
    got: list[bytes] = []

    async def receive() -> None:
        got.extend(await plain.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        assert plain.south.signal.enabled
        for message in (b"one", b"two", b"six"):
            assert plain.north.produce(message, 3, slots=SLOTS) == 1
            plain.north.signal.inject()
    assert got == [b"one", b"two", b"six"]
    assert plain.north.statistics().notifications == 1
    assert not plain.south.signal.enabled  # awake, it wants no doorbells
    await plain.producer.send(b"more", 4, slots=SLOTS)
    assert plain.north.statistics().notifications == 1


async def test_a_producer_waits_for_room(plain: Link) -> None:
    """A batch larger than the ring goes through, in order, as room comes."""
    sent = [b"%03d" % i for i in range(50)]
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:
        payload = b"".join(sent)

        async def send() -> None:
            await plain.producer.send(payload, 3, slots=SLOTS)

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert plain.north.signal.enabled
        while len(got) < len(sent):
            got += await plain.receive(3)
    assert got == sent
    assert plain.producer.statistics().sleeps > 0


@pytest.mark.parametrize("limit", [1, 3, 64])
async def test_two_tasks_and_many_messages(link: Link, limit: int) -> None:
    """Nothing is lost or reordered, whoever waits for whom."""
    sent = [b"%06d" % i * (i % 9) for i in range(2000)]
    got: list[bytes] = []

    async def send() -> None:
        for i in range(0, len(sent), 10):
            chunk = sent[i : i + 10]
            sizes = array("I", map(len, chunk))
            await link.producer.send(b"".join(chunk), sizes, slots=SLOTS)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while len(got) < len(sent):
                got += await link.receive(limit)
    assert got == sent


async def test_the_receive_direction(link: Link) -> None:
    """R12: south produces into north's buffers, north consumes and reposts."""
    guest = link.guest
    buffers = [(i, BUFFERS + 64 * i, 64) for i in range(4)]
    guest.end(NORTH).push(buffers, Index.VALID)
    producer = RingProducer(link.south, link.bells[SOUTH])
    consumer = RingConsumer(guest.end(NORTH, link.bells[SOUTH].ring), link.bells[NORTH])
    into, sizes = bytearray(256), array("I", [0] * 4)
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(producer.send, b"".join(b"%08d" % i for i in range(100)), 8)
        while len(got) < 800:
            n = await consumer.receive(into, sizes, repost=64)
            got += into[: 8 * n]
    assert got == b"".join(b"%08d" % i for i in range(100))


async def test_cancelled_receive_takes_nothing(link: Link) -> None:
    await link.producer.send(b"kept", 4, slots=SLOTS)
    with trio.CancelScope() as scope:
        scope.cancel()
        await link.receive()
    assert scope.cancelled_caught
    assert await link.receive() == [b"kept"]


async def test_cancelled_asleep_it_wants_no_doorbell(plain: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plain.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert plain.south.signal.enabled
        nursery.cancel_scope.cancel()
    assert not plain.south.signal.enabled
    await plain.producer.send(b"later", 5, slots=SLOTS)
    assert await plain.receive() == [b"later"]


async def test_a_wake_without_work_sleeps_again(link: Link) -> None:
    """A peer may ring for nothing, as often as it likes."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.receive)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            link.bells[SOUTH].ring()
        await trio.testing.wait_all_tasks_blocked()
        await link.producer.send(b"x", 1, slots=SLOTS)
    assert link.consumer.statistics().waits == 1
    assert link.consumer.statistics().sleeps >= 3


async def test_a_ring_that_faults_ends_the_wait(link: Link) -> None:
    """R50: unmapped under a sleeper, the next wake says so."""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(RingFault, match="unmapped"):
                    await link.receive()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            link.guest.spaces[SOUTH].clear()
            link.bells[SOUTH].ring()


async def test_a_busy_peer_does_not_starve_other_tasks(link: Link) -> None:
    """A consumer that always finds work lets others run all the same."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        until = trio.current_time() + 0.02
        while trio.current_time() < until:
            await link.producer.send(b"busy", 4, slots=SLOTS)
            await link.receive()
        nursery.cancel_scope.cancel()
    assert turns >= 50


async def test_every_wait_notices_a_cancellation(link: Link) -> None:
    with trio.move_on_after(0.01) as scope:
        while True:
            await link.producer.send(b"busy", 4, slots=SLOTS)
            await link.receive()
    assert scope.cancelled_caught


async def test_the_peer_learns_that_there_is_room(plain: Link) -> None:
    await plain.producer.send(b"abcd", 1, slots=SLOTS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plain.producer.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert len(await plain.receive(1)) == 1
    assert plain.north.room()


def test_a_spin_adapts_to_what_pays_off() -> None:
    spin = AdaptiveSpin(limit_us=40)
    assert spin.budget_us == 40
    for _ in range(10):
        spin.learn(10_000_000)
    assert spin.budget_us == 0
    spin.learn(30_000)
    assert 0 < spin.budget_us < 40
    for _ in range(5):
        spin.learn(30_000)
    assert spin.budget_us == 40


async def test_a_spin_polls_in_short_looks_and_stops_when_it_pays() -> None:
    looks: list[int] = []

    def poll(ns: int) -> bool:
        looks.append(ns)
        return len(looks) == 3

    spin = AdaptiveSpin(limit_us=100_000)
    assert await spin.look(poll)
    assert len(looks) == 3
    assert max(looks) <= 5_000
    spin.learn(10**12)
    assert not await AdaptiveSpin(limit_us=0).look(poll)


async def test_one_spin_makes_a_sleep_unneeded() -> None:
    """While an end spins it stays masked, so the peer rings no doorbell."""
    link = Link(4, AdaptiveSpin(limit_us=5_000_000))
    got: list[bytes] = []

    async def receive() -> None:
        got.extend(await link.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        assert not link.south.signal.enabled
        await link.producer.send(b"caught", 6, slots=SLOTS)
    assert got == [b"caught"]
    assert link.consumer.statistics().sleeps == 0
    assert link.north.statistics().notifications == 0
    link.close()


async def test_a_ring_needs_no_doorbell_type() -> None:
    """Anything that can be awaited wakes an end (`Wakeable`)."""
    link = Link(4)
    event = trio.Event()

    class Wake:
        async def wait(self) -> object:
            return await event.wait()

    ring: Ring = link.guest.end(SOUTH)
    consumer = RingConsumer(ring, Wake())
    into, sizes = bytearray(8), array("I", [0])
    north = link.guest.end(NORTH, event.set)
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            assert await consumer.receive(into, sizes) == 1

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        north.produce(b"x", 1, slots=SLOTS)
        north.signal.inject()
    assert into[:1] == b"x"
    link.close()
