"""The driver's end: the bytes it writes, and devices that break the rules."""

import gc
import struct
import weakref
from collections.abc import Iterator

import pytest

from proxy.memory import DmaMemory
from proxy.virtio.errors import DriverQueueError
from proxy.virtio.ring import DriverQueue, RingLayout, table_bytes
from vbus.errors import FaultError, InvalidError

INDIRECT, EVENT_IDX, PACKED = 1 << 28, 1 << 29, 1 << 34
SIZE = 4


class Driver:
    """A queue in a guest's memory, and a device's hand on it."""

    def __init__(self, features: int, entries: int = 0) -> None:
        self.memory = DmaMemory(1 << 20)
        space = self.memory.space
        ring = self.memory.allocate(RingLayout.bytes_for(SIZE), alignment=4096)
        self.at = RingLayout.at(ring.addr, SIZE)
        space.write(ring.addr, b"\xff" * ring.size)  # a ring is laid over anything
        self.tables = self.memory.allocate(table_bytes(SIZE, 4)).addr
        self.queue = DriverQueue(
            space, SIZE, self.at, features, tables=self.tables, entries=entries
        )

    def get(self, form: str, address: int) -> tuple[int, ...]:
        size = struct.calcsize("<" + form)
        return struct.unpack("<" + form, self.memory.space.read(address, size))

    def put(self, form: str, address: int, *values: int) -> None:
        self.memory.space.write(address, struct.pack("<" + form, *values))

    def descriptors(self) -> list[tuple[int, ...]]:
        return [self.get("QIHH", self.at.desc + 16 * n) for n in range(SIZE)]

    def use(self, count: int, ident: int, size: int) -> None:
        """As a device with a split ring."""
        self.put("II", self.at.device + 4 + 8 * ((count - 1) % SIZE), ident, size)
        self.put("H", self.at.device + 2, count)


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    made = Driver(*getattr(request, "param", (0,)))
    yield made
    made.memory.close()


packed = pytest.mark.parametrize("driver", [(PACKED,)], indirect=True, ids=[""])


def test_a_layout_is_the_legacy_one() -> None:
    """R20: also fit for a modern device."""
    assert RingLayout.at(0x10000, 256) == (0x10000, 0x11000, 0x12000)
    assert RingLayout.bytes_for(256) == 0x2000 + 6 + 8 * 256
    assert table_bytes(256, 4) == 256 * 64


def test_a_split_chain_as_bytes(driver: Driver) -> None:
    """2.7.5, 2.7.6."""
    assert driver.queue.add_batch([([(1, 2), (3, 4)], [(5, 6)], "a")]) == 1
    assert driver.descriptors()[:3] == [(1, 2, 1, 1), (3, 4, 1, 2), (5, 6, 2, 3)]
    assert driver.get("3H", driver.at.driver) == (0, 1, 0)
    assert (driver.queue.room, driver.queue.in_flight) == (1, 1)
    assert driver.queue.add_batch([([(1, 2)], [], "b"), ([(1, 2)], [], "c")]) == 1
    assert driver.get("4H", driver.at.driver) == (0, 2, 0, 3)
    driver.use(1, 0, 6)
    assert driver.queue.collect(8) == [("a", 6)]
    assert driver.queue.room == 3


@packed
def test_a_packed_chain_as_bytes(driver: Driver) -> None:
    """2.8.6, 2.8.13: flags by lap, the id in each descriptor."""
    avail, used, following, write = 1 << 7, 1 << 15, 1, 2
    assert driver.queue.add_batch([([(1, 2), (3, 4)], [(5, 6)], "a")]) == 1
    assert driver.descriptors() == [
        (1, 2, 0, following | avail),
        (3, 4, 0, following | avail),
        (5, 6, 0, write | avail),
        (0, 0, 0, 0),
    ]
    driver.put("IHH", driver.at.desc + 8, 5, 0, avail | used | write)
    assert driver.queue.collect(8) == [("a", 5)]
    assert driver.queue.add_batch([([(7, 8)], [(9, 10)], "b")]) == 1
    assert driver.descriptors()[3] == (7, 8, 0, following | avail)
    assert driver.descriptors()[0] == (9, 10, 0, write | used)
    driver.put("IHH", driver.at.desc + 16 * 3 + 8, 0, 0, avail | used)
    assert driver.queue.collect(8) == [("b", 0)]


@pytest.mark.parametrize("driver", [(INDIRECT, 4)], indirect=True)
def test_an_indirect_split_table(driver: Driver) -> None:
    """2.7.5.3: one descriptor for a chain of several buffers; one buffer needs none."""
    driver.queue.add_batch([([(9, 9)], [], "x"), ([(1, 2), (3, 4)], [(5, 6)], "a")])
    table = driver.tables + 64
    assert driver.descriptors()[0][:3] == (9, 9, 0)
    assert driver.descriptors()[1][:3] == (table, 48, 4)
    rows = [driver.get("QIHH", table + 16 * n) for n in range(3)]
    assert [row[:3] for row in rows] == [(1, 2, 1), (3, 4, 1), (5, 6, 2)]
    assert [row[3] for row in rows[:2]] == [1, 2]
    assert driver.queue.room == 2


@pytest.mark.parametrize("driver", [(INDIRECT | PACKED, 4)], indirect=True)
def test_an_indirect_packed_table(driver: Driver) -> None:
    """2.8.7: no flag but WRITE, no id."""
    driver.queue.add_batch([([(1, 2), (3, 4)], [(5, 6)], "a")])
    assert driver.descriptors()[0] == (driver.tables, 48, 0, 4 | 1 << 7)
    rows = [driver.get("QIHH", driver.tables + 16 * n) for n in range(3)]
    assert rows == [(1, 2, 0, 0), (3, 4, 0, 0), (5, 6, 0, 2)]


@pytest.mark.parametrize(
    "chain",
    [
        ([], [], 0),
        ([(1, 0)], [], 0),
        ([(1, 1 << 32)], [], 0),
        ([(1, 1)] * 3, [(1, 1)] * 2, 0),
        ([], [(1, (1 << 32) - 1), (1, 1)], 0),
    ],
    ids=["nothing", "no bytes", "4 GiB", "too many", "4 GiB together"],
)
def test_a_chain_that_never_fits(
    driver: Driver, chain: tuple[list[tuple[int, int]], list[tuple[int, int]], object]
) -> None:
    """Refused; what came before it in the batch is added."""
    with pytest.raises(InvalidError):
        driver.queue.add_batch([([(1, 1)], [], "good"), chain])
    assert driver.get("H", driver.at.driver + 2) == (1,)
    assert driver.queue.in_flight == 1


def test_misuse(driver: Driver) -> None:
    with pytest.raises(TypeError):
        driver.queue.add_batch([(1, 2)])  # type: ignore[list-item]
    with pytest.raises(InvalidError, match="cannot have 3 entries"):
        DriverQueue(driver.memory.space, 3, driver.at, 0)
    with pytest.raises(FaultError):
        DriverQueue(driver.memory.space, SIZE, RingLayout(0, 0, 0), 0)


def refused(queue: DriverQueue, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(DriverQueueError, match=rf"\({reason}\)") as caught:
            queue.collect(8)
        assert caught.value.reason == queue.broken == reason
    with pytest.raises(DriverQueueError, match=reason):
        queue.add_batch([([(1, 1)], [], 0)])
    assert queue.enable_interrupts() is True
    assert queue.kick_needed() is False


@pytest.mark.parametrize(
    ("count", "ident", "size", "reason"),
    [
        (1, SIZE, 0, "used-id"),
        (1, 1 << 31, 0, "used-id"),
        (1, 1, 0, "used-id"),  # free
        (1, 0, 7, "used-length"),
        (1, 0, (1 << 32) - 1, "used-length"),
    ],
)
def test_a_device_that_breaks_a_split_ring(
    driver: Driver, count: int, ident: int, size: int, reason: str
) -> None:
    """R12: it can neither name another chain, nor claim to have written past one."""
    driver.queue.add_batch([([], [(5, 6)], "a")])
    driver.use(count, ident, size)
    refused(driver.queue, reason)


def test_a_device_that_gives_back_too_much(driver: Driver) -> None:
    """What was good before comes first."""
    driver.queue.add_batch([([], [(5, 6)], "a")])
    driver.use(1, 0, 6)
    driver.use(2, 0, 6)
    assert driver.queue.collect(8) == [("a", 6)]
    refused(driver.queue, "used-index")


@packed
@pytest.mark.parametrize(
    ("ident", "size", "reason"), [(2, 0, "used-id"), (0, 7, "used-length")]
)
def test_a_device_that_breaks_a_packed_ring(
    driver: Driver, ident: int, size: int, reason: str
) -> None:
    driver.queue.add_batch([([], [(5, 6)], "a")])
    driver.put("IHH", driver.at.desc + 8, size, ident, 1 << 7 | 1 << 15 | 2)
    refused(driver.queue, reason)


def test_memory_that_is_gone(driver: Driver) -> None:
    driver.queue.add_batch([([], [(5, 6)], "a")])
    driver.memory.space.close()
    driver.queue.disable_interrupts()
    refused(driver.queue, "ring-unmapped")


def test_tokens_are_kept_and_let_go(driver: Driver) -> None:
    """By the queue while in flight; a queue that is its own token is collected."""

    class Token:
        pass

    class Owned(DriverQueue):
        pass

    token = Token()
    seen = weakref.ref(token)
    driver.queue.add_batch([([(1, 1)], [], token)])
    del token
    gc.collect()
    assert seen() is not None
    driver.use(1, 0, 0)
    driver.queue.collect(1)
    gc.collect()
    assert seen() is None
    queue = Owned(driver.memory.space, SIZE, driver.at, 0)
    gone = weakref.ref(queue)
    queue.add_batch([([(1, 1)], [], queue)])
    del queue
    gc.collect()
    assert gone() is None


def test_statistics(driver: Driver) -> None:
    driver.queue.add_batch([([(1, 1)], [], 0)])
    assert driver.queue.kick_needed()
    driver.put("H", driver.at.device, 1)  # no kicks
    driver.queue.add_batch([([(1, 1)], [], 0)])
    assert not driver.queue.kick_needed()
    driver.use(1, 0, 0)
    driver.queue.collect(1)
    seen = driver.queue.statistics()
    assert (seen.size, seen.collected, seen.kicked, seen.suppressed) == (SIZE, 1, 1, 1)
    assert seen.broken is None
