"""The in-flight record against a model: a process that dies at any step."""

import ctypes
import mmap
import random
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.virtio.queue import VirtQueue, record_size
from shm import AddressSpace, create_memfd
from tests.backends.virtio.driver_ring import (
    BUFFERS,
    NEXT,
    PACKED,
    RING,
    Memory,
    PackedRing,
    RawRing,
    SplitRing,
)
from tests.backends.virtio.test_queue_sanitizers import HERE, INCLUDES, ROOT
from vbus.errors import InvalidError, ProtocolError

SIZE = 8
NONE, DIED, FAILED = -1, -2, -3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The headers of the product, with steps to die at."""
    built = tmp_path_factory.mktemp("steps") / "steps.so"
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC"]
    includes = [f"-I{ROOT / each}" for each in INCLUDES]
    source = str(HERE / "record_steps.c")
    # gcc fears for variables that longjmp() may spoil; a dead process has none.
    command = ["gcc", *options, "-Wno-clobbered", *includes, source, "-o", str(built)]
    subprocess.run(command, check=True, timeout=120)
    loaded = ctypes.CDLL(str(built))
    loaded.end_new.restype = ctypes.c_void_p
    return loaded


class Driver:
    """A driver that does as it should, and notes what it offered and got back."""

    def __init__(self, packed: bool) -> None:
        self.memory = Memory()
        self.ring: SplitRing | PackedRing = (PackedRing if packed else SplitRing)(
            SIZE, memory=self.memory
        )
        self.free = list(range(SIZE))
        self.outstanding: dict[int, int] = {}
        """Id: descriptors, in the order in which they were offered."""
        self._seen, self._wrap = 0, True

    def offer(self, count: int) -> None:
        """Offer a chain of so many descriptors, if there is room."""
        if count > len(self.free):
            return
        taken, self.free = self.free[:count], self.free[count:]
        head = taken[0]
        self.outstanding[head] = count
        if isinstance(self.ring, PackedRing):
            flags = [NEXT] * (count - 1) + [0]
            self.ring.chain(*((BUFFERS, 64, each, head) for each in flags))
            self.lent = {**getattr(self, "lent", {}), head: taken}
            return
        for this, after in zip(taken, [*taken[1:], None], strict=True):
            last = after is None
            self.ring.describe(this, (BUFFERS, 64, 0 if last else NEXT, after or 0))
        self.lent = {**getattr(self, "lent", {}), head: taken}
        self.ring.offer(head)

    def reap(self) -> list[int]:
        """Take back what is used; each must be out."""
        found = []
        while (ident := self._next_used()) is not None:
            assert ident in self.outstanding, f"{ident} came back and was not out"
            del self.outstanding[ident]
            self.free += self.lent.pop(ident)
            found.append(ident)
        return found

    def _next_used(self) -> int | None:
        ring = self.ring
        if isinstance(ring, PackedRing):
            used = ring.used(self._seen, self._wrap)
            if used is None:
                return None
            self._seen += self.outstanding[used[0]]
            if self._seen >= SIZE:
                self._seen, self._wrap = self._seen - SIZE, not self._wrap
            return used[0]
        (index,) = self.memory.get("H", ring.at.device + 2)
        if index == self._seen:
            return None
        at = ring.at.device + 4 + 8 * (self._seen % SIZE)
        self._seen = (self._seen + 1) & 0xFFFF
        return self.memory.get("I", at)[0]


class Device:
    """Processes of the device, one after the other."""

    def __init__(self, library: ctypes.CDLL, driver: Driver) -> None:
        self.held: list[int] = []
        """What the process took and has not given back, in order."""
        self._library = library
        self._driver = driver
        self._record = mmap.mmap(-1, max(record_size(SIZE), 4096))
        self._end: ctypes.c_void_p | None = None
        assert self._begin(0, resume=False)

    def _begin(self, steps: int, *, resume: bool) -> bool:
        ring, memory = self._driver.ring, self._driver.memory
        self._end = ctypes.c_void_p(
            self._library.end_new(memory.fd, ctypes.c_uint64(memory.size))
        )
        record = ctypes.c_char.from_buffer(self._record)
        status = self._library.end_open(
            self._end,
            SIZE,
            (ctypes.c_uint64 * 3)(*ring.at),
            ctypes.c_uint64(ring.features),
            ctypes.byref(record),
            resume,
            ctypes.c_long(steps),
        )
        assert status in (0, DIED)
        if status:
            self.die()
        return status == 0

    def resume(self, steps: int) -> None:
        """Begin with what the process before left, if need be after more deaths."""
        while not self._begin(steps, resume=True):
            steps += 1  # it gets one step further each time
        self._driver.reap()

    @property
    def alive(self) -> bool:
        return self._end is not None

    def die(self) -> None:
        self._library.end_free(self._end)
        self._end = None
        self.held.clear()

    def pop(self, steps: int) -> None:
        got = self._library.end_pop(self._end, ctypes.c_long(steps))
        assert got != FAILED
        if got == DIED:
            self.die()
        elif got != NONE:
            out = [one for one in self._driver.outstanding if one not in self.held]
            assert got == out[0], "a request out of its order"
            self.held.append(got)

    def give(self, choice: int, steps: int) -> None:
        """Give back some of what is held."""
        which = [n for n in range(len(self.held)) if choice >> n & 1]
        if not which:
            return
        got = self._library.end_give(
            self._end,
            (ctypes.c_uint32 * len(which))(*which),
            len(which),
            ctypes.c_long(steps),
        )
        if got == DIED:
            self.die()
            return
        given = {self.held[n] for n in which}
        self.held = [one for one in self.held if one not in given]
        assert given <= set(self._driver.reap())


ROUNDS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), max_size=5),
        st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=6),
        st.lists(
            st.tuples(st.integers(1, 255), st.sampled_from([0, *range(1, 17)])),
            max_size=3,
        ),
        st.booleans(),
        st.integers(0, 12),
    ),
    min_size=1,
    max_size=12,
)
"""Each: chains to offer; the steps at which to die when taking, when giving back (and
what); whether to die at last; the steps of resuming. 0 steps are none to die at."""


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rounds=ROUNDS)
def test_each_request_comes_back_once_wherever_the_process_dies(
    library: ctypes.CDLL,
    packed: bool,
    rounds: list[tuple[list[int], list[int], list[tuple[int, int]], bool, int]],
) -> None:
    """Issue 6: taken again in the order in which they were taken, given back once."""
    driver = Driver(packed)
    device = Device(library, driver)
    for offers, pops, gives, dies, resuming in rounds:
        if not device.alive:
            device.resume(resuming)
        for count in offers:
            driver.offer(count)
        for steps in pops:
            if device.alive:
                device.pop(steps)
        for which, steps in gives:
            if device.alive:
                device.give(which, steps)
        if dies and device.alive:
            device.die()
    if not device.alive:
        device.resume(0)
    while driver.outstanding:
        before = len(driver.outstanding)
        for _ in range(SIZE):
            device.pop(0)
        device.give(255, 0)
        assert len(driver.outstanding) < before
    device.die()
    driver.memory.close()


# The record as another process may leave it


class Kept:
    """Memory for a record, and a ring with it."""

    def __init__(self, ring: RawRing) -> None:
        size = max(record_size(ring.size), 4096)
        self.space = AddressSpace()
        self.fd = create_memfd("record", size)
        self.space.map(0, size, self.fd)
        self.view = self.space.view(0, record_size(ring.size))
        self.ring = ring

    def queue(self, *, resume: bool) -> VirtQueue:
        ring = self.ring
        return VirtQueue(
            ring.memory.device,
            ring.size,
            ring.at,
            ring.features,
            None,
            self.view,
            resume=resume,
        )


@pytest.fixture(params=[0, PACKED], ids=["split", "packed"])
def kept(request: pytest.FixtureRequest) -> Iterator[Kept]:
    ring = PackedRing(SIZE) if request.param else SplitRing(SIZE)
    yield Kept(ring)
    ring.memory.close()


def begun(kept: Kept) -> None:
    """Take two chains, give one back; the process ends."""
    queue = kept.queue(resume=False)
    for head in range(2):
        descriptor = (BUFFERS, 64, 0, head)
        if isinstance(kept.ring, SplitRing):
            kept.ring.chain(descriptor, first=head)
        else:
            assert isinstance(kept.ring, PackedRing)
            kept.ring.chain(descriptor)
    first, _ = queue.pop_batch(8)
    queue.push(first, 0)


def test_the_next_queue_takes_what_was_out(kept: Kept) -> None:
    begun(kept)
    queue = kept.queue(resume=True)
    (again,) = queue.pop_batch(8)
    assert again.id == 1
    assert queue.should_notify()  # it is not known what the driver was told
    queue.push(again, 0)
    assert kept.queue(resume=True).pop_batch(8) == []


def test_a_record_that_is_unmapped_breaks_the_queue(kept: Kept) -> None:
    begun(kept)
    queue = kept.queue(resume=True)
    (chain,) = queue.pop_batch(8)
    kept.space.clear()
    with pytest.raises(ProtocolError):
        queue.push(chain, 0)
    assert queue.broken == "record-unmapped"


def test_a_record_of_another_ring_is_refused(kept: Kept) -> None:
    with pytest.raises(InvalidError):
        kept.queue(resume=True)  # nothing was ever written there
    begun(kept)
    kept.ring.features ^= PACKED
    with pytest.raises(InvalidError):
        kept.queue(resume=True)


def test_any_bytes_in_a_record_are_refused_or_stay_in_the_guests_memory(
    kept: Kept,
) -> None:
    """R51: a record that lies breaks its own queue, at most."""
    choice = random.Random(7)
    begun(kept)
    good, guest = kept.view.read(), kept.ring.memory.guest
    rings = guest.read(RING, BUFFERS - RING)
    outcomes = set()
    for _ in range(2000):
        spoiled = bytearray(good)
        for _ in range(choice.randrange(1, 6)):
            at = choice.choice([16, 20, 24, 64]) + choice.randrange(64)
            spoiled[at % len(good)] = choice.choice([0, 1, 0x7F, 0x80, 0xFF])
        if choice.random() < 0.2:
            spoiled[16:] = choice.randbytes(len(good) - 16)
        kept.view.write(0, bytes(spoiled))
        guest.write(RING, rings)
        try:
            queue = kept.queue(resume=True)
        except InvalidError:
            outcomes.add("refused")
            continue
        try:
            for chain in queue.pop_batch(64):
                outcomes.add("taken")
                chain.read()
                queue.push(chain, 0)
        except ProtocolError:
            outcomes.add("broken")
    assert outcomes == {"refused", "taken", "broken"}
