"""Events through a real ring in guest memory: order, interrupts, hostile rings."""

import struct
from collections.abc import Iterator

import pytest

from vbus import Device, SharedMemory, abi
from vbus.abi import EventId, text_of
from vbus.pci.constants import Irq
from vbus.testing import GuestPeer, RecordedBridge, Shared, now


class Sink(Device):
    type = "org.vbus.sink"


def make(descriptors: int, *, queues: int = 1, names: bool = False) -> RecordedBridge:
    recorded = RecordedBridge({"sink": Sink})
    recorded.peer.vectors = {(Irq.MSIX, vector) for vector in range(8)}
    recorded.add("sink0", "sink")
    offer = abi.CAP_NAMES * names | abi.CAP_MULTIQUEUE * (queues > 1)
    now(recorded.peer.start(offer, queues=queues, size=descriptors))
    recorded.peer.take_events()
    return recorded


@pytest.fixture
def recorded() -> Iterator[RecordedBridge]:
    with make(16) as recorded:
        yield recorded


def share(recorded: RecordedBridge, *priorities: int) -> list[Shared]:
    """Open the device and share one memory per priority, all enabled by the guest."""
    peer = recorded.peer
    handle = now(peer.open(0))
    made = []
    for id, prio in enumerate(priorities):
        shared = now(peer.share(handle, id, 64, signal_offset=0, prio=prio))
        peer.memory.write(shared.addr + 8, b"\1")
        made.append(shared)
    return made


def south(recorded: RecordedBridge) -> list[SharedMemory]:
    return list(recorded.bridge.connections[0].shm.values())


def inject(shm: SharedMemory) -> None:
    assert shm.signal is not None
    shm.signal.inject()


def handled(peer: GuestPeer, shared: Shared) -> None:
    """The guest's handler for that memory ran: dirty and pending are cleared."""
    peer.memory.write(shared.addr + 9, b"\0\0")


# Coalescing (R6)


def test_a_signal_is_outstanding_once_until_handled(recorded: RecordedBridge) -> None:
    """Its `pending` byte and its one event object see to it."""
    (shared,) = share(recorded, 0)
    (memory,) = south(recorded)
    for _ in range(1000):
        inject(memory)
    assert len(recorded.peer.take_events()) == 1
    handled(recorded.peer, shared)
    inject(memory)
    assert len(recorded.peer.take_events()) == 1


def test_one_interrupt_serves_many_devices(recorded: RecordedBridge) -> None:
    """While the guest drains, further signals join the ring (argument 2b)."""
    peer = recorded.peer
    made = share(recorded, *[0] * 8)
    before = len(peer.interrupts)
    for memory in south(recorded):
        inject(memory)
    assert len(peer.interrupts) == before + 1
    cookies = [event.handle for event in peer.take_events()]
    assert cookies == [shared.cookie for shared in made]


def test_interrupts_per_signal_fall_as_load_rises() -> None:
    """R6: the guest takes its events each time after `load` signals were raised."""
    per_thousand = {}
    for load in (1, 4, 16, 64):
        with make(256) as recorded:
            peer = recorded.peer
            made = share(recorded, *[0] * 64)
            memories = south(recorded)
            before = len(peer.interrupts)
            for start in range(0, 1000, load):
                for number in range(start, min(1000, start + load)):
                    inject(memories[number % 64])
                peer.take_events()
                for shared in made:
                    handled(peer, shared)
            per_thousand[load] = len(peer.interrupts) - before
    assert per_thousand == {1: 1000, 4: 250, 16: 63, 64: 16}


def test_no_interrupt_while_the_guest_is_in_its_handler(
    recorded: RecordedBridge,
) -> None:
    peer = recorded.peer
    share(recorded, 0, 0, 0)
    first, second, third = south(recorded)
    inject(first)
    inject(second)
    before = len(peer.interrupts)
    assert len(peer.take_events(limit=1)) == 1
    inject(third)
    assert len(peer.interrupts) == before
    assert len(peer.take_events()) == 2


# Priorities (R7)


def test_priority_seven_overtakes_a_flood_on_queues_of_its_own() -> None:
    """With a flood on priority 0, a signal of priority 7 is handled before any
    priority-0 event that was queued after the guest's current batch."""
    with make(16, queues=8) as recorded:
        peer = recorded.peer
        made = share(recorded, *[0] * 63, 7)
        memories = south(recorded)
        urgent = made[-1].cookie
        for memory in memories[:32]:
            inject(memory)
        batch = peer.take_events(limit=4)
        for memory in memories[32:63]:
            inject(memory)
        inject(memories[63])
        order = [event.handle for event in peer.take_events()]
        assert order[0] == urgent
        assert len(batch) + len(order) < 64  # some are behind a full ring
        while recorded.effects.answer_doorbells() or recorded.bridge.events.waiting:
            order += [event.handle for event in peer.take_events()]
        order += [event.handle for event in peer.take_events()]
        assert sorted(order) == sorted(shared.cookie for shared in made[4:])


def test_priority_seven_overtakes_a_flood_on_one_queue() -> None:
    """One queue: what is in the ring is the guest's batch; the backlog is sorted."""
    with make(16) as recorded:
        peer = recorded.peer
        made = share(recorded, *[0] * 63, 7)
        memories = south(recorded)
        for memory in memories:
            inject(memory)
        order: list[int] = []
        while len(order) < 64:
            order += [event.handle for event in peer.take_events()]
        assert order[16] == made[-1].cookie
        rest = [shared.cookie for shared in made[:-1]]
        assert order[:16] + order[17:] == rest


@pytest.mark.parametrize("vector", range(8))
def test_each_queue_has_a_vector_of_its_own(vector: int) -> None:
    """Extension: queue i raises MSI-X vector i."""
    with make(16, queues=8) as recorded:
        share(recorded, vector)
        recorded.peer.interrupts.clear()
        inject(south(recorded)[0])
        assert recorded.peer.interrupts == [(Irq.MSIX, vector)]


# Back-pressure


def test_three_thousand_events_through_a_small_ring() -> None:
    """ABI 4.2: nothing is lost, and the guest rings once per full ring."""
    with make(64) as recorded:
        peer = recorded.peer
        for number in range(1500):
            recorded.add(f"more{number}", "sink")
            recorded.model.unlink("test", f"more{number}")
        taken: list[tuple[int, int]] = []
        while events := peer.take_events():
            taken += [(event.eventid, event.handle) for event in events]
            recorded.check()
        pairs = [(kind, id) for id in range(1, 1501) for kind in (0, 1)]
        assert taken == pairs
        statistics = recorded.bridge.statistics().events
        assert statistics.lost == 0
        assert statistics.stalls <= 3000 // 64 + 1


def test_room_by_eventfd_works_as_by_message(recorded: RecordedBridge) -> None:
    peer = recorded.peer
    for number in range(40):
        recorded.add(f"more{number}", "sink")
    peer.signal = lambda *_: None  # type: ignore[method-assign]
    assert len(peer.take_events()) == 16
    assert peer.take_events() == []
    (doorbell,) = recorded.effects.watched
    assert recorded.bridge.io_eventfds(1, 8)[0].fd == doorbell.fileno()
    doorbell.ring()
    assert recorded.effects.answer_doorbells() == 1
    assert len(peer.take_events()) == 16


def test_a_pop_between_full_and_asking_is_not_missed(
    recorded: RecordedBridge,
) -> None:
    """ABI 5.4, lost wakeup at enable: the host rings in the guest's place."""
    peer = recorded.peer
    queue = peer.queues[0]
    peer.memory.write(queue.view.addr + 8 + 8 + 5, b"\1")  # south dirty, unasked
    for number in range(17):
        recorded.add(f"more{number}", "sink")
    assert recorded.effects.answer_doorbells() == 1
    assert recorded.effects.answer_doorbells() == 0  # asked again, not in a loop
    assert [len(peer.take_events()) for _ in range(3)] == [16, 1, 0]


# Names


def test_the_name_comes_just_before_the_device() -> None:
    """R2, extension: whatever else waits."""
    with make(4, names=True) as recorded:
        share(recorded, *[7] * 6)
        for number, memory in enumerate(south(recorded)):
            inject(memory)
            recorded.add(f"more{number}", "sink")
        events = []
        while batch := recorded.peer.take_events():
            events += batch
        adds = [at for at, event in enumerate(events) if event.eventid == 0]
        assert len(adds) == 6
        for number, at in enumerate(adds):
            name = events[at - 1]
            assert name.eventid == EventId.DEVNAME
            assert name.handle == events[at].handle == number + 1
            assert text_of(name.text) == f"more{number}"


def test_without_the_capability_there_are_no_names(recorded: RecordedBridge) -> None:
    recorded.add("more", "sink")
    (event,) = recorded.peer.take_events()
    assert event.eventid == EventId.DEVADD


# Hostile rings

HEAD_OF_FIRST = 56


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (HEAD_OF_FIRST + 8, 0x1230_0000, "outside of the block"),
        (HEAD_OF_FIRST + 8, (1 << 64) - 1, "outside of the block"),
        (HEAD_OF_FIRST + 16, 143, "143 bytes"),
        (HEAD_OF_FIRST + 16, 0, "0 bytes"),
        (36 + 4, 0xFFFFFFFF, "inuse-tail"),
        (36, 0xFFFFFFFF, "inuse-head"),
    ],
)
def test_a_hostile_ring_gets_no_more_events(
    at: int, value: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Until NEGOTIATE; a log line and a counter; the rest goes on."""
    with RecordedBridge({"sink": Sink}) as recorded:
        peer = recorded.peer
        now(peer.start(size=16))
        width = 4 if at < HEAD_OF_FIRST else 8
        base = peer.queues[0].view.addr
        peer.memory.write(
            base + at, (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        )
        recorded.add("sink0", "sink")
        recorded.add("sink1", "sink")
        recorded.check()
        assert peer.interrupts == []
        assert recorded.bridge.statistics().events.faults == 1
        (record,) = caplog.records
        assert reason in record.getMessage()
        assert now(peer.open(0))  # calls go on
        now(peer.start(size=16))
        assert len(peer.take_events()) == 2


def test_a_ring_whose_memory_went_is_a_fault(recorded: RecordedBridge) -> None:
    peer = recorded.peer
    peer.bridge.memory.clear()
    before = peer.memory.read(peer.base, peer.size)
    recorded.add("more", "sink")
    assert recorded.bridge.statistics().events.faults == 1
    assert peer.memory.read(peer.base, peer.size) == before


def test_a_descriptor_is_read_once(recorded: RecordedBridge) -> None:
    """The buffer lies at the very end of the block, not one byte behind it."""
    peer = recorded.peer
    queue = peer.queues[0]
    last = queue.data + 15 * abi.EVENT_SIZE
    tail = struct.unpack("<I", peer.memory.read(queue.view.addr + 40, 4))[0]
    slot = queue.view.addr + 56 + 32 * tail + 8
    peer.memory.write(slot, struct.pack("<Q", last))
    recorded.add("more", "sink")
    assert len(peer.take_events()) == 1
    peer.memory.write(slot + 32, struct.pack("<Q", last + 1))
    recorded.add("even-more", "sink")
    assert recorded.bridge.statistics().events.faults == 1
