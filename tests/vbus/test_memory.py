"""Guest memory that other processes map too."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from shm import create_memfd
from vbus.errors import InvalidError
from vbus.memory import GuestMemory, Mapped

PAGE = 4096


class Mirror:
    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.seen: list[tuple[str, int, int]] = []
        self.done: list[object] = []

    def mapped(self, range: Mapped) -> None:
        assert os.fstat(range.fd)
        self.seen.append(("mapped", range.addr, range.size))

    def unmapped(self, addr: int, size: int) -> None:
        self.seen.append(("unmapped", addr, size))
        self.done.append(self.memory.retracting())


@pytest.fixture
def memfd(no_fd_leak: None) -> Iterator[int]:
    fd = create_memfd("test", 8 * PAGE)
    yield fd
    os.close(fd)


def test_a_descriptor_is_kept_as_long_as_the_range_is_mapped(memfd: int) -> None:
    """The caller's own may be closed meanwhile; none is left in the end."""
    memory = GuestMemory()
    memory.map(0, PAGE, memfd)
    memory.map(PAGE, PAGE, memfd, PAGE, writable=False)
    memory.map(1 << 30, PAGE, None)
    assert [(one.addr, one.offset, one.writable) for one in memory.ranges()] == [
        (0, 0, True),
        (PAGE, PAGE, False),
    ]
    assert memory.unmap(0, PAGE) == 1
    assert [one.addr for one in memory.ranges()] == [PAGE]
    with pytest.raises(InvalidError):
        memory.unmap(PAGE, 17)
    assert [one.addr for one in memory.ranges()] == [PAGE]
    memory.close()
    assert memory.ranges() == []


async def test_the_fence_stands_until_every_mirror_has_let_go(memfd: int) -> None:
    """R51: nobody is told that a range is free before that."""
    memory = GuestMemory()
    mirrors = [Mirror(memory), Mirror(memory)]
    for mirror in mirrors:
        memory.attach(mirror)
    memory.map(0, PAGE, memfd)
    assert memory.fence() is None
    memory.unmap(0, 1 << 40)
    fence = memory.fence()
    assert fence is not None
    passed = False

    async def wait() -> None:
        nonlocal passed
        await fence()
        passed = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        for mirror in mirrors:
            await trio.testing.wait_all_tasks_blocked()
            assert not passed
            (done,) = mirror.done
            assert callable(done)
            done()
    assert passed
    assert memory.fence() is None
    assert mirrors[0].seen == [("mapped", 0, PAGE), ("unmapped", 0, 1 << 40)]
    memory.detach(mirrors[1])
    memory.map(0, PAGE, memfd)
    assert len(mirrors[1].seen) == 2
    memory.close()


def test_unmapping_nothing_asks_nobody(memfd: int) -> None:
    memory = GuestMemory()
    mirror = Mirror(memory)
    memory.attach(mirror)
    memory.map(1 << 30, PAGE, None)
    memory.unmap(0, PAGE)
    memory.unmap(1 << 30, PAGE)
    assert mirror.seen == []
