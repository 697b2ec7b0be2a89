"""The record of a venet as another process may leave it."""

import os
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ioq import Ring, RingFault, ring_size
from shm import AddressSpace, Locality, create_memfd
from vbus.net import HostEnd
from vbus.net._core import RECORD_SIZE

SIZE = 1 << 20
COUNT = 16
PARTS = ("tx", "rx", "events")
EVENT_POOL = 0x20000


class World:
    """A guest's rings of both ways, freshly formatted, and memory for a record."""

    def __init__(self, stack: ExitStack) -> None:
        self.fd = create_memfd("guest", SIZE)
        self.record_fd = create_memfd("record", -(-RECORD_SIZE // 4096) * 4096)
        stack.callback(os.close, self.fd)
        stack.callback(os.close, self.record_fd)
        self.guest = AddressSpace()
        self.guest.map(0, SIZE, self.fd)
        for nth in range(len(PARTS)):
            Ring.format(self.guest.view(0x4000 * (nth + 1), ring_size(COUNT)), COUNT)
        self.area = AddressSpace()
        self.area.map(0, os.fstat(self.record_fd).st_size, self.record_fd)
        self.record = self.area.view(0, RECORD_SIZE)

    def end(self) -> HostEnd:
        """A process of the device."""
        space = AddressSpace()
        space.map(0, SIZE, self.fd)
        end = HostEnd(1500, 10, self.record)
        end.configure(0, 0, True, True)
        for nth, name in enumerate(PARTS):
            view = space.view(0x4000 * (nth + 1), ring_size(COUNT))
            end.attach(
                name, Ring(view, space, Locality.SOUTH, lambda: None, limit=COUNT)
            )
        end.attach("event_pool", space.view(EVENT_POOL, 24 * COUNT))
        return end


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def test_what_waits_for_room_is_there_in_the_next_process(world: World) -> None:
    first = world.end()
    first.begin()
    first.link_event(True)
    assert first.pending == 1
    second = world.end()
    second.resume()
    assert second.pending == 1


def test_a_record_that_is_unmapped_is_touched_no_more(world: World) -> None:
    end = world.end()
    end.begin()
    end.link_event(True)
    world.area.clear()
    assert end.pending == 0
    assert not end.blocked
    end.link_event(False)
    assert end.pending == 1


def test_memory_that_is_no_record_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="record"):
        world.end().resume()


def test_any_bytes_in_a_record_are_a_fault_of_its_own_rings(world: World) -> None:
    """R51: never more than an exception, in the process that goes on."""
    choice = random.Random(8)
    world.end().begin()
    head, rings = world.record.read(0, 8), world.guest.read(0, SIZE)
    outcomes = set()
    for _ in range(1000):
        small = [choice.choice([0, 1, 2, 15, 16, 17, 1 << 31]) for _ in range(16)]
        spoiled = head + struct.pack("<16I", *small) + choice.randbytes(2048)
        world.record.write(0, spoiled)
        world.guest.write(0, rings)
        end = world.end()
        try:
            end.resume()
        except (RingFault, ValueError) as error:
            outcomes.add(type(error))
            continue
        outcomes.add(type(None))
        end.set_up(True)
        try:
            end.link_event(True)
            end.flush_rx()
        except RingFault:
            outcomes.add(RingFault)
    assert outcomes == {RingFault, ValueError, type(None)}
