"""The guest's memory: the allocator against a model, buffers, exhaustion."""

import fcntl
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from proxy.memory import BASE_ADDRESS, Allocator, DmaMemory
from vbus.errors import FaultError, InvalidError, NoSpaceError

START, SIZE = 0x1010, 2000


class AllocatorModel(RuleBasedStateMachine):
    """The allocator against a map of the bytes that are taken."""

    addresses = Bundle("addresses")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(START, SIZE)
        self.sizes: dict[int, int] = {}
        self.map = bytearray(SIZE)

    def fits(self, size: int, alignment: int) -> bool:
        hole = bytes(size)
        starts = range(-START % alignment, SIZE - size + 1, alignment)
        return any(self.map.startswith(hole, at) for at in starts)

    @rule(
        target=addresses,
        size=st.integers(1, SIZE // 3),
        alignment=st.sampled_from([1, 16, 64, 256]),
    )
    def allocate(self, size: int, alignment: int) -> object:
        if not self.fits(size, alignment):
            with pytest.raises(NoSpaceError):
                self.allocator.allocate(size, alignment)
            return multiple()
        address = self.allocator.allocate(size, alignment)
        at = address - START
        assert address % alignment == 0
        assert 0 <= at <= SIZE - size
        assert not any(self.map[at : at + size])
        self.map[at : at + size] = b"x" * size
        self.sizes[address] = size
        return address

    @rule(address=consumes(addresses))
    def free(self, address: int) -> None:
        self.allocator.free(address)
        with pytest.raises(InvalidError):
            self.allocator.free(address)
        size = self.sizes.pop(address)
        at = address - START
        self.map[at : at + size] = bytes(size)

    @invariant()
    def what_is_free_is_in_as_few_pieces_as_can_be(self) -> None:
        holes = bytes(self.map).split(b"x")
        assert self.allocator.largest_hole == max(map(len, holes))
        assert self.allocator.used == sum(self.sizes.values())
        assert self.allocator.allocations == len(self.sizes)


TestAllocator = AllocatorModel.TestCase
TestAllocator.settings = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(("size", "alignment"), [(0, 64), (-1, 64), (8, 0), (8, 3)])
def test_nonsense_is_refused(size: int, alignment: int) -> None:
    with pytest.raises(InvalidError):
        Allocator(START, SIZE).allocate(size, alignment)


def test_a_buffer_is_memory_that_the_device_sees_at_its_address() -> None:
    with DmaMemory(1 << 20) as memory:
        buffer = memory.allocate(100, alignment=4096)
        assert buffer.addr % 4096 == 0
        assert buffer.addr >= BASE_ADDRESS
        buffer.view.write(0, b"hello")
        assert memory.space.read(buffer.addr, 5) == b"hello"
        assert os.pread(memory.fd, 5, buffer.addr - memory.base) == b"hello"


def test_the_file_cannot_shrink_under_the_host() -> None:
    with DmaMemory(1 << 20) as memory:
        assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(memory.fd, 0)


def test_a_closed_buffer_is_free_again_and_dead() -> None:
    with DmaMemory(1 << 20) as memory:
        buffer = memory.allocate(1 << 20)
        with pytest.raises(NoSpaceError, match="65536 bytes"):
            memory.allocate(65536)
        buffer.close()
        buffer.close()
        with pytest.raises(FaultError):
            buffer.view.read(0, 1)
        memory.allocate(1 << 20)
        assert memory.statistics().used == 1 << 20


def test_memory_is_whole_pages() -> None:
    with pytest.raises(InvalidError):
        DmaMemory(1000)
    with pytest.raises(InvalidError, match="3145728 bytes is not whole pages"):
        DmaMemory(3 << 20, huge=True)
