"""ConfiguredFunction: bounds, the MSI-X table, the choice of interrupt, reset."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from shm import AddressSpace
from vbus.errors import CallTimeoutError, InvalidError
from vbus.pci.config_space import Bar, ConfigSpace, Identity, Msi, Msix
from vbus.pci.constants import Irq, Offset, Region
from vbus.pci.function import NO_REGION, ConfiguredFunction, Pending, RegionInfo
from vbus.pci.pending import settle


class Recorder(ConfiguredFunction):
    def __init__(self, msix=True, pin=1):
        capabilities = [Msi()] + ([Msix(8, 2, 0x800)] if msix else [])
        bars = {0: Bar(64), 1: Bar(32, io=True), 2: Bar(4096)}
        config = ConfigSpace(
            Identity(0x11DA, 0x2000, 0x068000), bars, capabilities, interrupt_pin=pin
        )
        super().__init__(config, AddressSpace())
        self.seen = []

    def bar_read(self, bar, offset, size):
        self.seen.append(("read", bar, offset, size))
        return super().bar_read(bar, offset, size)

    def bar_write(self, bar, offset, data):
        self.seen.append(("write", bar, offset, data))
        return super().bar_write(bar, offset, data)

    def bus_master_changed(self, enabled):
        self.seen.append(("bus master", enabled))


class Sink:
    """Listens on the vectors it is told to."""

    def __init__(self, *listening):
        self.listening = set(listening)
        self.raised = []

    def trigger(self, index, vector):
        if (index, vector) not in self.listening:
            return False
        self.raised.append((index, vector))
        return True


def test_regions_are_bars_and_configuration_space():
    function = Recorder()
    assert function.region(0) == RegionInfo(64)
    assert function.region(1) == RegionInfo(32, io=True)
    assert function.region(Region.CONFIG) == RegionInfo(256)
    assert all(function.region(n) == NO_REGION for n in (3, 4, 5, 6, 8, 9))


def test_irq_kinds_follow_what_is_configured():
    counts = [Recorder().irq_count(index) for index in range(6)]
    assert counts == [1, 1, 8, 0, 0, 0]
    counts = [Recorder(msix=False, pin=0).irq_count(index) for index in range(6)]
    assert counts == [0, 1, 0, 0, 0, 0]


numbers = st.integers(-10, 5000)


@given(st.integers(-1, 10), numbers, st.integers(-1, 5000))
def test_no_access_goes_beyond_its_region(region, offset, size):
    """R53."""
    function = Recorder()
    limit = function.region(region).size
    inside = offset >= 0 and size > 0 and offset + size <= limit
    if inside:
        assert len(function.read(region, offset, size)) == size
        assert function.write(region, offset, bytes(size)) is None
    else:
        with pytest.raises(InvalidError):
            function.read(region, offset, size)
        if size >= 0:
            with pytest.raises(InvalidError):
                function.write(region, offset, bytes(size))
        assert function.seen == []


def test_subclass_sees_its_own_bars_only():
    function = Recorder()
    function.write(0, 4, b"\0\0\0\0")
    function.write(2, 0, b"\0\0\0\0")
    function.write(Region.CONFIG, Offset.BAR0, b"\0\0\0\0")
    function.read(1, 0, 4)
    assert function.seen == [("write", 0, 4, b"\0\0\0\0"), ("read", 1, 0, 4)]
    without = Recorder(msix=False)
    without.write(2, 0, b"\0")
    assert without.seen == [("write", 2, 0, b"\0")]


def test_vector_table_keeps_messages_and_masks():
    function = Recorder()
    masked = b"\0" * 12 + b"\1\0\0\0"
    assert function.read(2, 0, 128) == masked * 8
    function.write(2, 16, b"\xff" * 16)
    entry = b"\xfc" + b"\xff" * 11 + b"\1\0\0\0"
    assert function.read(2, 0, 48) == masked + entry + masked
    function.write(2, 16 + 12, b"\0\0\0\0")
    assert function.read(2, 28, 4) == b"\0\0\0\0"
    function.write(2, 120, b"\xff" * 2048)
    assert function.read(2, 128, 4096 - 128) == bytes(4096 - 128)
    function.reset()
    assert function.read(2, 0, 128) == masked * 8


def master(function, on=True):
    function.write(Region.CONFIG, Offset.COMMAND, b"\6\0" if on else b"\2\0")


def test_interrupt_goes_to_what_the_client_listens_to():
    """MSI-X on that vector, else MSI, else INTx; decided anew each time."""
    function = Recorder()
    master(function)
    assert not function.interrupt(2)
    sink = Sink()
    function.attach(sink)
    assert not function.interrupt(2)
    for listening in ((Irq.INTX, 0), (Irq.MSI, 0), (Irq.MSIX, 2)):
        sink.listening.add(listening)
        assert function.interrupt(2)
        assert sink.raised[-1] == listening
    assert function.interrupt(3)
    assert sink.raised[-1] == (Irq.MSI, 0)


def test_without_bus_mastering_there_is_no_interrupt():
    """ABI 12.2."""
    function = Recorder()
    sink = Sink((Irq.MSI, 0))
    function.attach(sink)
    assert not function.interrupt()
    master(function)
    assert function.interrupt()
    master(function, on=False)
    assert not function.interrupt()


def test_intx_can_be_disabled_by_the_guest():
    function = Recorder()
    sink = Sink((Irq.INTX, 0))
    function.attach(sink)
    function.write(Region.CONFIG, Offset.COMMAND, b"\6\4")
    assert not function.interrupt()
    master(function)
    assert function.interrupt()


def test_subclass_learns_when_bus_mastering_changes():
    function = Recorder()
    master(function)
    master(function)
    master(function, on=False)
    master(function)
    function.reset()
    function.reset()
    changes = [event[1] for event in function.seen]
    assert changes == [True, False, True, False]


def test_detached_function_is_as_new():
    function = Recorder()
    before = function.read(Region.CONFIG, 0, 256)
    sink = Sink((Irq.MSI, 0))
    function.attach(sink)
    assert function.attached
    master(function)
    function.write(Region.CONFIG, Offset.BAR0, b"\0\0\xab\xfe")
    function.detach()
    assert not function.attached
    assert not function.interrupt()
    assert sink.raised == []
    assert function.read(Region.CONFIG, 0, 256) == before


async def test_pending_access_is_completed_with_its_value():
    async def work():
        await trio.lowlevel.checkpoint()
        return 42

    pending = Pending(work, lambda outcome: bytes([outcome.unwrap()]), 1.0)
    assert await settle(pending) == b"\x2a"


async def test_pending_access_is_completed_with_its_error():
    async def work():
        raise InvalidError("no")

    seen = []
    assert await settle(Pending(work, seen.append, 1.0)) is None
    assert isinstance(seen[0].error, InvalidError)


async def test_pending_access_has_a_deadline(autojump_clock):
    seen = []
    await settle(Pending(trio.sleep_forever, seen.append, 2.0))
    assert isinstance(seen[0].error, CallTimeoutError)
    assert trio.current_time() == pytest.approx(2.0, abs=0.01)


async def test_cancelled_access_is_not_completed():
    seen = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await settle(Pending(trio.sleep_forever, seen.append, 2.0))
    assert seen == []
