"""Both ends of a queue against the model, over any sequence of operations."""

import os
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backends.virtio.queue import Chain, RingAddresses, VirtQueue
from proxy.virtio.ring import DriverQueue, RingLayout
from tests.backends.virtio.driver_ring import (
    BUFFERS,
    EVENT_IDX,
    INDIRECT,
    PACKED,
    RING,
    TABLES,
    Memory,
)
from tests.backends.virtio.model import Model, ModelChain

ENTRIES = 4
SLOT = 0x2000
SPARE = 1 << 30
# Regions that meet inside buffers: a buffer may lie in two of them.
BORDERS = [BUFFERS + 0x1000 + SLOT * n for n in range(40)]
LENGTHS = st.lists(st.integers(1, 0x700), max_size=5)


class QueueMachine(RuleBasedStateMachine):
    """R26, R28: DriverQueue and VirtQueue over one memory do what the model does."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 5, 8, 16]),
        packed=st.booleans(),
        event_idx=st.booleans(),
        indirect=st.booleans(),
    )
    def open(self, size: int, packed: bool, event_idx: bool, indirect: bool) -> None:
        if not packed and size == 5:
            size = 4
        self.features = PACKED * packed | EVENT_IDX * event_idx | INDIRECT * indirect
        self.entries = ENTRIES if indirect else 0
        self.model = Model(size, packed, event_idx)
        self.memory = Memory(borders=BORDERS)
        self.layout = RingLayout.at(RING, size)
        self.driver = DriverQueue(
            self.memory.guest,
            size,
            self.layout,
            self.features,
            tables=TABLES,
            entries=self.entries,
        )
        self.device = self.attach()
        self.chains: dict[int, Chain] = {}
        self.places: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self.tokens = 0

    def attach(self, **more: object) -> VirtQueue:
        return VirtQueue(
            self.memory.device,
            self.model.size,
            RingAddresses(*self.layout),
            self.features,
            **more,  # type: ignore[arg-type]
        )

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    # The driver

    def chain(
        self, out: Sequence[int], into: Sequence[int]
    ) -> tuple[ModelChain, tuple[list[tuple[int, int]], list[tuple[int, int]], int]]:
        """Place buffers one after the other, with gaps, in a slot of their own."""
        token = self.tokens
        self.tokens += 1
        busy = {slot for slot, _ in self.places.values()}
        slot = next(n for n in range(40) if n not in busy)
        at, places = BUFFERS + SLOT * slot, []
        for size in (*out, *into):
            places.append((at, size))
            at += size + 3
        data = os.urandom(sum(out))
        offset = 0
        for address, size in places[: len(out)]:
            self.memory.guest.write(address, data[offset : offset + size])
            offset += size
        self.places[token] = slot, places[len(out) :]
        n = len(places)
        takes = 1 if 1 < n <= self.entries else n
        units = takes if self.model.packed else 1
        model = ModelChain(token, data, sum(into), takes, units)
        return model, (places[: len(out)], places[len(out) :], token)

    @rule(shapes=st.lists(st.tuples(LENGTHS, LENGTHS), max_size=6))
    def add(self, shapes: list[tuple[list[int], list[int]]]) -> None:
        # A chain that never fits is refused, which is a test of its own.
        shapes = [
            (out, into)
            for out, into in shapes
            if 0 < len(out) + len(into) <= self.model.size
        ]
        chains = [self.chain(out, into) for out, into in shapes]
        expected = 0
        for model, _ in chains:
            if not self.model.add(model):
                break
            expected += 1
        assert self.driver.add_batch([each for _, each in chains]) == expected
        for model, _ in chains[expected:]:
            del self.places[model.token]

    @rule()
    def kick(self) -> None:
        assert self.driver.kick_needed() == self.model.kicks.due(self.model.added)

    @rule(limit=st.integers(0, 20))
    def collect(self, limit: int) -> None:
        expected = self.model.collect(limit)
        got = self.driver.collect(limit)
        assert got == [(chain.token, written) for chain, written in expected]
        for token, written in got:
            _, places = self.places.pop(token)
            data = b"".join(self.memory.guest.read(*place) for place in places)
            assert data[:written] == pattern(token, written)

    @rule()
    def disable_interrupts(self) -> None:
        self.driver.disable_interrupts()
        self.model.disable(self.model.interrupts)

    @rule()
    def enable_interrupts(self) -> None:
        assert self.driver.enable_interrupts() == self.model.enable_interrupts()

    # The device

    @rule(limit=st.integers(0, 20))
    def pop(self, limit: int) -> None:
        expected = self.model.pop(limit)
        got = self.device.pop_batch(limit)
        assert [each.read() for each in got] == [each.data for each in expected]
        assert [each.writable for each in got] == [each.writable for each in expected]
        for chain, model in zip(got, expected, strict=True):
            self.chains[model.token] = chain

    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(sorted(self.chains)))
        tokens = order[: data.draw(st.integers(0, len(order)))]
        done = []
        for token in tokens:
            chain = self.chains.pop(token)
            written = data.draw(st.integers(0, chain.writable))
            chain.write(0, pattern(token, written))
            self.model.push(token, written)
            done.append((chain, written))
        self.device.push_batch(done)

    @rule()
    def notify(self) -> None:
        due = self.model.interrupts.due(self.model.pushed)
        assert self.device.should_notify() == due

    @rule()
    def disable_kicks(self) -> None:
        self.device.disable_kicks()
        self.model.disable(self.model.kicks)

    @rule()
    def enable_kicks(self) -> None:
        assert self.device.enable_kicks() == self.model.enable_kicks()

    @rule()
    def change_the_space(self) -> None:
        """Chains find their memory again when regions came and went."""
        if self.memory.device.unmap(SPARE, 0x1000) == 0:
            self.memory.device.map(SPARE, 0x1000, self.memory.fd)

    @rule()
    def restart(self) -> None:
        """A device that goes on where another stopped."""
        if not self.chains:
            self.device = self.attach(state=self.device.save())
            self.model.interrupts.unknown = True

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "device"):
            return
        assert self.device.broken is None
        assert self.driver.broken is None
        assert self.device.in_flight == len(self.chains) == len(self.model.taken)
        assert self.driver.room == self.model.room
        assert self.driver.in_flight == sum(
            map(len, (self.model.available, self.model.taken, self.model.used))
        )


def pattern(token: int, size: int) -> bytes:
    """What the device writes into a chain."""
    return (token.to_bytes(4, "little") * (size // 4 + 1))[:size]


TestQueues = QueueMachine.TestCase
TestQueues.settings = settings(max_examples=100)
