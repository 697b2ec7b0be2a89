"""What registers do in the state that all layouts share (virtio 1.2, 4.1)."""

import re

import pytest

from backends.virtio.constants import Ring, bits
from backends.virtio.pci import LAYOUTS, function
from tests.backends.virtio.pci.registers import (
    LIVE,
    NO_VECTOR,
    SETUP,
    Bench,
    Sample,
    bench,
)
from vbus.errors import InvalidError
from vbus.pci.constants import Irq, Offset, Region
from vbus.virtio.common import Status

BAR = 4
VERSION_1 = bits(Ring.VERSION_1)
INTX_DISABLE = 1 << 10


def modern(part: Bench, offset: int, size: int, value: int | None = None) -> int:
    """Read a common register, or write it."""
    if value is None:
        return part.get(BAR, offset, size)
    part.put(BAR, offset, size, value)
    return value


def accept(part: Bench, features: int) -> None:
    for select in range(2):
        modern(part, 8, 4, select)
        modern(part, 12, 4, features >> 32 * select & 0xFFFF_FFFF)


def negotiate(part: Bench, features: int = VERSION_1) -> int:
    modern(part, 20, 1, 0)
    modern(part, 20, 1, SETUP)
    accept(part, features)
    modern(part, 20, 1, SETUP | Status.FEATURES_OK)
    return modern(part, 20, 1)


def place(part: Bench, index: int) -> None:
    """Give a queue a ring in memory, and enable it."""
    modern(part, 22, 2, index)
    for n, address in enumerate((0x1000, 0x2000, 0x3000)):
        modern(part, 32 + 8 * n, 4, address + 0x8000 * index)
        modern(part, 36 + 8 * n, 4, 0)
    modern(part, 28, 2, 1)


def go(part: Bench, features: int = VERSION_1) -> None:
    assert negotiate(part, features) & Status.FEATURES_OK
    place(part, 0)
    modern(part, 20, 1, LIVE)
    assert part.model.status == LIVE


# Negotiation


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (VERSION_1 | 1 << 5, "features 0x20 were not offered"),
        (VERSION_1 | 1 << 50, "were not offered"),
        (1, "VERSION_1 was not accepted"),
        (0, "VERSION_1 was not accepted"),
        (VERSION_1 | 2, r"feature 1 needs one of \(0,\)"),
    ],
)
def test_features_ok_stays_clear_for_what_breaks_a_rule(
    features: int, said: str
) -> None:
    """virtio 1.2, 2.2.2, 3.1.1 and 6.2: the driver reads the status again."""
    with bench("modern") as part:
        assert negotiate(part, features) == SETUP
        refused = part.model.statistics().refusal
        assert refused is not None
        assert re.search(said, refused)
        modern(part, 20, 1, LIVE)
        assert not modern(part, 20, 1) & Status.DRIVER_OK
        assert negotiate(part) & Status.FEATURES_OK


def test_features_have_more_than_32_bits() -> None:
    """R27: word by word, nothing behind the second; what was accepted reads back."""
    with bench("modern") as part:
        words = []
        for select in (0, 1, 2, 0xFFFF_FFFF):
            modern(part, 0, 4, select)
            words.append(modern(part, 4, 4))
        assert words[0] & 3 == 3
        assert words[1] == part.model.offered >> 32
        assert words[1] & 3 == 3, "VERSION_1 and ACCESS_PLATFORM"
        assert words[2:] == [0, 0]
        accept(part, VERSION_1 | 1)
        modern(part, 8, 4, 7)
        modern(part, 12, 4, 0xFFFF_FFFF)
        assert part.model.accepted == VERSION_1 | 1
        modern(part, 8, 4, 1)
        assert modern(part, 12, 4) == 1


def test_features_are_settled_by_features_ok() -> None:
    with bench("modern") as part:
        negotiate(part, VERSION_1 | 1)
        accept(part, VERSION_1)
        assert part.model.features == VERSION_1 | 1


# Reset


def test_a_reset_forgets_everything_that_a_driver_set() -> None:
    """4.1.4.3.1, 2.1.2: selectors, vectors, queues, the ISR."""
    with bench("modern") as part:
        go(part, VERSION_1 | 1)
        modern(part, 0, 4, 1)
        modern(part, 16, 2, 2)
        modern(part, 26, 2, 1)
        part.model.change_config(level=9)
        modern(part, 20, 1, 0)
        assert modern(part, 20, 1) == 0
        assert modern(part, 0, 4) == modern(part, 8, 4) == modern(part, 22, 2) == 0
        assert modern(part, 12, 4) == 0
        assert modern(part, 16, 2) == modern(part, 26, 2) == NO_VECTOR
        assert modern(part, 28, 2) == 0
        assert modern(part, 32, 4) == 0
        assert part.get(BAR, 0x1000, 1) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_function_reset_is_power_on(layout: str) -> None:
    """A new client, and a machine's reset, find nothing of the life before."""
    with bench(layout) as part:
        registers = {bar: b.size for bar, b in part.function.config.bars.items()}
        fresh = snapshot(part, registers)
        part.model.set_status(int(SETUP))
        part.function.transport.queue_select = 1
        part.function.transport.kept["align"] = 64
        part.function.transport.isr = 3
        if part.function.config.msix is not None:
            part.msix(True)
            part.function.transport.config_vector = 1
        assert part.model.status == SETUP
        part.function.reset()
        assert not part.function.bus_master
        part.command(0b111)
        assert snapshot(part, registers) == fresh
        assert part.model.status == 0


def snapshot(part: Bench, bars: dict[int, int]) -> list[int]:
    """All configuration space, and every register that has a width of its own."""
    found = [part.get(Region.CONFIG, at, 4) for at in range(0, 256, 4)]
    for bar, size in bars.items():
        for width in (4, 2, 1):
            found += [part.get(bar, at, width) for at in range(0, min(size, 64), width)]
    part.function.transport.reset()
    return found


# Queues


def test_a_queue_that_is_not_there_reads_zero_and_takes_nothing() -> None:
    """4.1.4.3: queue_size 0 says so."""
    with bench("modern") as part:
        negotiate(part)
        before = part.function.statistics().ignored
        for index in (2, 0x7FFF, 0xFFFF):
            modern(part, 22, 2, index)
            for at, size in ((24, 2), (28, 2), (32, 4), (36, 4), (48, 4)):
                assert modern(part, at, size) == 0
                modern(part, at, size, 1)
            assert modern(part, 26, 2) == NO_VECTOR
            modern(part, 26, 2, 0)
            modern(part, 58, 2, 1)
        assert part.function.statistics().ignored == before + 3 * 7
        assert not any(queue.enabled for queue in part.model.queues)


def test_a_queue_size_is_a_power_of_two_up_to_the_limit() -> None:
    with bench("modern") as part:
        negotiate(part)
        for size in (0, 3, 17, 32, 0xFFFF):
            modern(part, 24, 2, size)
            assert modern(part, 24, 2) == 16
        modern(part, 24, 2, 8)
        assert modern(part, 24, 2) == 8
        place(part, 0)
        modern(part, 24, 2, 4)
        assert modern(part, 24, 2) == 8, "an enabled queue does not change"


def test_a_packed_queue_has_any_size() -> None:
    with bench("modern") as part:
        negotiate(part, VERSION_1 | bits(Ring.PACKED))
        modern(part, 24, 2, 5)
        assert modern(part, 24, 2) == 5


def test_a_queue_is_disabled_by_a_reset_only() -> None:
    """4.1.4.3.2: never by writing 0."""
    with bench("modern") as part:
        go(part, VERSION_1 | bits(Ring.RESET))
        modern(part, 28, 2, 0)
        assert modern(part, 28, 2) == 1
        modern(part, 26, 2, 2)
        modern(part, 58, 2, 1)
        assert modern(part, 58, 2) == 0, "complete when the write returns"
        assert modern(part, 28, 2) == 0
        assert modern(part, 26, 2) == NO_VECTOR
        assert part.model.status == LIVE
        place(part, 0)
        assert part.model.queues[0].ring is not None


def test_a_queue_reset_must_have_been_negotiated() -> None:
    with bench("modern") as part:
        go(part)
        modern(part, 58, 2, 1)
        assert modern(part, 28, 2) == 1


def test_a_vector_that_is_not_there_reads_back_as_none() -> None:
    """4.1.5.1.2.1."""
    with bench("modern") as part:
        for at in (16, 26):
            modern(part, at, 2, 2)
            assert modern(part, at, 2) == 2
            modern(part, at, 2, 3)
            assert modern(part, at, 2) == NO_VECTOR
    with bench("legacy") as part:
        part.msix(True)
        part.put(0, 20, 2, 3)
        assert part.get(0, 20, 2) == NO_VECTOR


# Interrupts


def test_each_queue_and_the_configuration_have_their_vectors() -> None:
    with bench("modern") as part:
        part.msix(True)
        go(part)
        modern(part, 16, 2, 0)
        modern(part, 26, 2, 2)
        part.function.transport.queue_interrupt(0)
        part.model.change_config(level=1)
        part.function.transport.queue_interrupt(1)  # has no vector
        assert part.raised == [(Irq.MSIX, 2), (Irq.MSIX, 0)]
        assert part.get(BAR, 0x1000, 1) == 0, "the ISR is INTx's"


def test_without_messages_the_line_stands_until_the_isr_is_read() -> None:
    """4.1.4.5: bit 0 for queues, bit 1 for the configuration, cleared by reading."""
    with bench("modern") as part:
        go(part)
        part.function.transport.queue_interrupt(0)
        part.model.change_config(level=1)
        assert part.raised == [(Irq.INTX, 0)] * 2
        assert part.function.line_asserted()
        assert part.get(BAR, 0x1000, 1) == 3
        assert not part.function.line_asserted()
        assert part.get(BAR, 0x1000, 1) == 0


def test_a_line_that_is_disabled_stands_once_it_is_enabled() -> None:
    with bench("modern") as part:
        go(part)
        part.command(0b111 | INTX_DISABLE)
        part.function.transport.queue_interrupt(0)
        assert part.raised == []
        part.command(0b111)
        assert part.raised == [(Irq.INTX, 0)]
        part.command(0b111)
        assert part.raised == [(Irq.INTX, 0)]


def test_without_bus_mastering_there_is_no_interrupt_and_no_memory() -> None:
    """R50: a driver that takes it away gets DEVICE_NEEDS_RESET, and a reset helps."""
    with bench("modern") as part:
        go(part)
        part.command(0b11)
        assert part.model.broken == "bus mastering was switched off"
        assert part.model.queues[0].ring is None
        assert part.raised == []
        part.command(0b111)
        go(part)
        assert part.model.broken is None


def test_a_driver_without_bus_mastering_does_not_get_started() -> None:
    with bench("modern") as part:
        part.command(0b11)
        negotiate(part)
        place(part, 0)
        modern(part, 20, 1, LIVE)
        assert part.model.queues[0].ring is None
        assert modern(part, 20, 1) & Status.NEEDS_RESET


# Kicks


def test_each_queue_is_kicked_in_its_slot() -> None:
    """4.1.5.2: where, not what is written; 16 bits."""
    with bench("modern") as part:
        for index in range(2):
            modern(part, 22, 2, index)
            slot = 0x3000 + 4 * modern(part, 30, 2)
            part.put(BAR, slot, 2, index)
        assert part.model.kicks == [0, 1]
        for offset, size in ((0x3000, 1), (0x3001, 2), (0x3002, 2), (0x3003, 4)):
            part.put(BAR, offset, size, 0)
        part.put(BAR, 0x3008, 2, 0)  # the slot of no queue
        assert part.model.kicks == [0, 1]
        assert part.get(BAR, 0x3000, 2) == 0


def test_a_legacy_kick_names_the_queue() -> None:
    with bench("legacy") as part:
        for index in (1, 0, 77):
            part.put(0, 16, 2, index)
        assert part.model.kicks == [1, 0, 77]
        part.put(0, 16, 4, 1)
        assert len(part.model.kicks) == 3


# The function


def test_a_device_is_shown_once_at_a_time() -> None:
    model = Sample()
    first = function(model, "modern")
    with pytest.raises(InvalidError, match="on a transport already"):
        function(model, "legacy")
    first.close()
    function(model, "legacy").close()


def test_an_unknown_layout_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(InvalidError, match="no layout 'best': there are modern,"):
        function(Sample(), "best")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_with_many_queues_has_room_for_all_its_vectors(layout: str) -> None:
    with bench(layout, queues=300) as part:
        wanted = 0 if layout == "legacy-intx" else 301
        assert part.function.irq_count(Irq.MSIX) == wanted
        assert part.function.irq_count(Irq.INTX) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_say_who_may_drive_it(layout: str) -> None:
    """4.1.2: 0x1040 and the type for virtio 1.x alone, else the transitional ids."""
    with bench(layout) as part:
        ids = part.get(Region.CONFIG, 0, 2), part.get(Region.CONFIG, 2, 2)
        revision = part.get(Region.CONFIG, Offset.REVISION, 1)
        only_modern = layout in ("modern", "draft")
        assert ids == (0x1AF4, 0x1044 if only_modern else 0x1005)
        assert revision == int(only_modern)
        assert part.get(Region.CONFIG, Offset.SUBSYSTEM_ID, 2) == 4
