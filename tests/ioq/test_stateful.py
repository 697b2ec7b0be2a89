"""Any sequence of operations leaves the bytes that the slow model leaves (R12)."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ioq import Index, Iterator, Ring
from shm import Locality
from shm.errors import InvalidError
from tests.ioq.memory import BUFFERS, Guest
from tests.ioq.model import Descriptor, Model, Refused

SIDES = st.sampled_from(Locality)
INDICES = st.sampled_from(Index)
SLOT = 64


class RingMachine(RuleBasedStateMachine):
    """Iterator steps and batches from both sides; memory must equal the model's.

    Only the side whose turn it is by the ABI moves an end of an index, since two
    sides never push on, or never pop from, the same index.
    """

    @initialize(count=st.integers(1, 6))
    def attach(self, count: int) -> None:
        self.guest = Guest(count)
        self.model = Model(count)
        self.rings: dict[Locality, Ring] = {me: self.guest.end(me) for me in Locality}
        self.movers: dict[tuple[Index, str], Locality] = {}
        self.iterators: dict[tuple[Locality, Index | None, bool], Iterator] = {}

    def teardown(self) -> None:
        if hasattr(self, "guest"):
            self.guest.close()

    def may(self, me: Locality, what: str, *indices: Index) -> bool:
        return all(self.movers.setdefault((i, what), me) == me for i in indices)

    def iterator(self, me: Locality, index: Index | None, flip: bool) -> Iterator:
        key = (me, index, flip)
        if key not in self.iterators:
            self.iterators[key] = self.rings[me].iterator(index, flip_owner=flip)
        return self.iterators[key]

    @rule(me=SIDES, index=INDICES, flip=st.booleans(), data=st.data())
    def step_pop(
        self, me: Locality, index: Index, flip: bool, data: st.DataObject
    ) -> None:
        if not self.may(me, "pop", index):
            return
        it = self.iterator(me, index, flip)
        at = data.draw(st.sampled_from([self.model.head(index), 0]))
        it.seek_set(at)
        try:
            self.model.pop(me, index, at, flip=flip)
        except Refused:
            with pytest.raises(InvalidError):
                it.pop()
        else:
            it.pop()
            assert it.position == self.model.inc(at)

    @rule(
        me=SIDES,
        index=st.sampled_from([*Index, None]),
        flip=st.booleans(),
        fields=st.tuples(*[st.integers(0, 2**64 - 1)] * 3, st.booleans()),
    )
    def step_push(
        self,
        me: Locality,
        index: Index | None,
        flip: bool,
        fields: tuple[int, int, int, bool],
    ) -> None:
        both = index is None
        on = Index.VALID if index is None else index
        if not self.may(me, "push", *([*Index] if both else [on])):
            return
        if both and self.model.tail(0) != self.model.tail(1):
            return  # a fault, shown elsewhere
        it = self.iterator(me, index, flip)
        it.seek_tail()
        at = it.position
        assert at == self.model.tail(on)
        if it.owner == me:
            it.cookie, it.ptr, it.len, it.valid = fields
            self.model.put(at, Descriptor(*fields[:3], int(fields[3]), me))
        try:
            self.model.push(me, on, at, both=both, flip=flip)
        except Refused:
            with pytest.raises(InvalidError):
                it.push()
        else:
            it.push()

    @rule(me=SIDES, limit=st.integers(0, 8), flip=st.booleans())
    def batch_pop(self, me: Locality, limit: int, flip: bool) -> None:
        if not self.may(me, "pop", Index.INUSE):
            return
        expected = []
        positions = []
        at = self.model.head(Index.INUSE)
        while len(expected) < min(limit, self.model.count):
            descriptor = self.model.descriptor(at)
            if descriptor.sown != me:
                break
            expected.append(descriptor[:3])
            positions.append(at)
            at = self.model.inc(at)
        assert self.rings[me].peek(limit) == expected
        assert self.rings[me].pop(limit, flip=flip) == expected
        for at in positions:
            self.model.pop(me, Index.INUSE, at, flip=flip)

    @rule(me=SIDES, sizes=st.lists(st.integers(0, SLOT), max_size=8))
    def batch_produce(self, me: Locality, sizes: list[int]) -> None:
        """Both sides as producers with buffers of their own."""
        if not self.may(me, "push", Index.INUSE):
            return
        expected = 0
        at = self.model.tail(Index.INUSE)
        for size in sizes[: self.model.count]:
            if self.model.descriptor(at).sown != me:
                break
            new = Descriptor(at, BUFFERS + SLOT * at, size, 1, me)
            self.model.put(at, new)
            self.model.push(me, Index.INUSE, at, both=False, flip=True)
            expected += 1
            at = self.model.inc(at)
        payload = bytes(sum(sizes))
        lengths = array("I", sizes)
        slots = (BUFFERS, SLOT)
        assert self.rings[me].produce(payload, lengths, slots) == expected

    @invariant()
    def memory_is_equal(self) -> None:
        if hasattr(self, "guest"):
            assert self.guest.view.read() == bytes(self.model.memory)

    @invariant()
    def counting_is_equal(self) -> None:
        if hasattr(self, "guest"):
            for index in Index:
                expected = self.model.entries(index)
                assert self.rings[Locality.SOUTH].entries(index) == expected

    @invariant()
    def nothing_faulted(self) -> None:
        if hasattr(self, "guest"):
            assert [ring.fault for ring in self.rings.values()] == [None, None]


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
