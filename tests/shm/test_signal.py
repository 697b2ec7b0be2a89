"""shm-signal step by step: the bytes of ABI section 5, from both sides."""

import gc
import os
import weakref
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm import AddressSpace, Locality, ShmSignal, View, create_memfd
from shm.errors import FaultError, InvalidError

NORTH, SOUTH = Locality
HEAD = bytes.fromhex("df39fa5801000000")
AT = 24


class Pair:
    """Both ends of a signal, and how often each was notified."""

    def __init__(self) -> None:
        fd = create_memfd("signal", 4096)
        self.space = AddressSpace()
        self.space.map(0, 4096, fd)
        os.close(fd)
        self.view = self.space.view(0, 64)
        ShmSignal.format(self.view, AT)
        self.notified = {NORTH: 0, SOUTH: 0}
        self.ends = {me: self.end(me) for me in Locality}

    def end(self, me: Locality) -> ShmSignal:
        you = Locality(1 - me)

        def notify() -> None:
            self.notified[you] += 1

        return ShmSignal(self.view, AT, me, notify)

    def irq(self) -> str:
        """north enabled, pending, dirty, then south's."""
        return self.view.read(AT + 8, 6).hex()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.space.close()


def test_a_formatted_signal_is_masked_on_both_sides(pair: Pair) -> None:
    assert pair.view.read(AT, 16) == HEAD + bytes(8)
    assert pair.view.read(0, AT) == bytes(AT)


@pytest.mark.parametrize("byte", [0, 3, 4, 7])
def test_a_wrong_magic_or_version_is_refused(pair: Pair, byte: int) -> None:
    """R5: the host checks what the guest says is a signal (ABI 3.4)."""
    pair.view.write(AT + byte, b"\x55")
    with pytest.raises(InvalidError):
        pair.end(SOUTH)


@pytest.mark.parametrize("offset", [49, 64, 2**32 - 1, 2**64 - 8])
def test_a_signal_outside_the_memory_is_refused(pair: Pair, offset: int) -> None:
    with pytest.raises(InvalidError):
        ShmSignal(pair.view, offset, SOUTH, print)


def test_a_masked_peer_is_only_marked(pair: Pair) -> None:
    """R6: who did not ask for notifications gets none."""
    assert pair.ends[SOUTH].inject() is False
    assert pair.irq() == "000001000000"
    assert pair.notified == {NORTH: 0, SOUTH: 0}


def test_an_enabled_peer_is_notified_once(pair: Pair) -> None:
    """R6: while one notification is pending, further ones join it."""
    assert pair.ends[NORTH].enable() is False
    assert pair.ends[SOUTH].inject() is True
    assert pair.irq() == "010101000000"
    for _ in range(10):
        assert pair.ends[SOUTH].inject() is False
    assert pair.notified == {NORTH: 1, SOUTH: 0}
    statistics = pair.ends[SOUTH].statistics()
    assert (statistics.injects, statistics.notifications) == (11, 1)


def test_each_side_moves_its_own_bytes(pair: Pair) -> None:
    """R12: north and south are the same but for their bytes."""
    pair.ends[SOUTH].enable()
    pair.ends[NORTH].inject()
    assert pair.irq() == "000000010101"
    assert pair.notified == {NORTH: 0, SOUTH: 1}
    assert pair.ends[SOUTH].enabled
    assert pair.ends[SOUTH].pending
    assert pair.ends[SOUTH].dirty
    pair.ends[SOUTH].disable()
    assert pair.irq() == "000000000101"


def test_enable_tells_what_came_before(pair: Pair) -> None:
    """R6: nobody will notify of what came while masked."""
    pair.ends[SOUTH].inject()
    assert pair.ends[NORTH].enable() is True


def test_a_wakeup_ends_when_nothing_came_meanwhile(pair: Pair) -> None:
    north, south = pair.ends[NORTH], pair.ends[SOUTH]
    north.enable()
    south.inject()
    north.wakeup_begin()
    assert pair.irq() == "010100000000"  # pending keeps the peer quiet
    south.inject()
    assert north.wakeup_end() is True
    assert pair.irq() == "010101000000"
    north.wakeup_begin()
    assert north.wakeup_end() is False
    assert pair.irq() == "010000000000"
    assert pair.notified[NORTH] == 1


def test_a_handler_that_masks_itself_ends_the_wakeup(pair: Pair) -> None:
    """Polling mode (ABI 5.3): dirty may stay, and a later enable sees it."""
    north, south = pair.ends[NORTH], pair.ends[SOUTH]
    north.enable()
    south.inject()
    north.wakeup_begin()
    north.disable()
    south.inject()
    assert north.wakeup_end() is False
    assert pair.irq() == "000001000000"
    assert north.enable() is True


def test_the_signal_ends_with_its_memory(pair: Pair) -> None:
    """R50: no byte is touched after unmap."""
    pair.space.clear()
    for use in (
        pair.ends[NORTH].enable,
        pair.ends[NORTH].disable,
        pair.ends[NORTH].inject,
        pair.ends[NORTH].wakeup_begin,
        pair.ends[NORTH].wakeup_end,
    ):
        with pytest.raises(FaultError):
            use()
    with pytest.raises(FaultError):
        ShmSignal.format(pair.view, 0)


def test_a_failing_notify_reaches_the_caller(pair: Pair) -> None:
    def fail() -> None:
        raise OSError("no doorbell")

    south = ShmSignal(pair.view, AT, SOUTH, fail)
    pair.ends[NORTH].enable()
    with pytest.raises(OSError, match="no doorbell"):
        south.inject()


def test_a_signal_that_refers_to_its_owner_is_collected(pair: Pair) -> None:
    class Owner:
        signal: ShmSignal

        def notify(self) -> None: ...

    owner = Owner()
    owner.signal = ShmSignal(pair.view, AT, SOUTH, owner.notify)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_it_takes_a_view(pair: Pair) -> None:
    with pytest.raises(TypeError):
        ShmSignal.format(b"no view", 0)  # type: ignore[arg-type]
    assert isinstance(pair.view, View)


STEPS = ("enable", "disable", "inject", "wakeup_begin", "wakeup_end", "garbage")


class Model:
    """ABI 5.2 and 5.3 as sentences: [locality] -> enabled, pending, dirty."""

    def __init__(self) -> None:
        self.irq = [[0, 0, 0], [0, 0, 0]]

    def step(self, me: int, what: str) -> bool | None:
        mine, theirs = self.irq[me], self.irq[1 - me]
        if what == "enable":
            mine[0] = 1
            return bool(mine[1] or mine[2])
        if what == "disable":
            mine[0] = 0
        elif what == "inject":
            theirs[2] = 1
            crosses = bool(theirs[0] and not theirs[1])
            theirs[1] = 1 if crosses else theirs[1]
            return crosses
        elif what == "wakeup_begin":
            mine[2] = 0
        elif what == "wakeup_end":
            if mine[0] and mine[2]:
                return True
            mine[1] = 0
            return False
        return None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Locality), st.sampled_from(STEPS), st.binary(min_size=6)
        ),
        max_size=40,
    )
)
def test_any_sequence_moves_the_bytes_as_the_abi_says(
    steps: list[tuple[Locality, str, bytes]],
) -> None:
    """R6: step by step the same as the sentences, and garbage is only true or false."""
    pair, model = Pair(), Model()
    for me, what, garbage in steps:
        if what == "garbage":
            pair.view.write(AT + 8, garbage[:6])
            values = list(garbage[:6])
            model.irq = [values[:3], values[3:]]
        else:
            assert getattr(pair.ends[me], what)() == model.step(me, what)
        assert pair.irq() == bytes([*model.irq[0], *model.irq[1]]).hex()
    pair.space.close()
