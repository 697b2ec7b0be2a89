"""Legacy beside modern, and what the proposals of 2012 add (R20 to R26)."""

import struct

import pytest

from tests.backends.virtio.pci.registers import LIVE, NO_VECTOR, SETUP, Bench, bench
from vbus.pci.constants import Region
from vbus.virtio.common import Status

LEVEL, FIXED = 0x44332211, 42
SEPARATE_CONFIG = 1 << 31

MODERN_STATUS = {
    "transitional": (4, 20),
    "four-bar": (1, 22),
    "four-bar-command": (1, 22),
    "offsets": (2, 22),
    "offsets-table": (2, 12 + 22),
}
"""BAR and offset of the modern status, where legacy's is in BAR 0 at 18."""


# R20


def test_the_legacy_header_is_as_wide_as_it_is_written() -> None:
    """R20: offsets and widths, and nothing else at them."""
    with bench("legacy-intx") as part:
        widths = {0: 4, 4: 4, 8: 4, 12: 2, 14: 2, 16: 2, 18: 1, 19: 1}
        for at in range(20):
            for size in (1, 2, 4):
                before = part.function.statistics().ignored
                part.get(0, at, size)
                known = widths.get(at) == size and at != 16  # write-only
                assert (part.function.statistics().ignored == before) is known
        assert part.get(0, 0, 4) == part.model.offered & 0xFFFF_FFFF
        assert part.get(0, 12, 2) == 16
        part.put(0, 14, 2, 2)
        assert part.get(0, 12, 2) == 0, "there is no queue 2"


@pytest.mark.parametrize("layout", ["legacy", "transitional", "mirrored"])
def test_the_configuration_is_at_20_or_at_24_with_msix(layout: str) -> None:
    """R20: the vectors come in between while MSI-X is enabled."""
    with bench(layout) as part:
        assert (part.get(0, 20, 4), part.get(0, 24, 4)) == (LEVEL, FIXED)
        part.msix(True)
        assert (part.get(0, 24, 4), part.get(0, 28, 4)) == (LEVEL, FIXED)
        assert (part.get(0, 20, 2), part.get(0, 22, 2)) == (NO_VECTOR, NO_VECTOR)
        part.put(0, 22, 2, 1)
        assert part.get(0, 22, 2) == 1
        part.msix(False)
        assert part.get(0, 20, 4) == LEVEL


def test_configuration_is_little_endian_and_of_any_width() -> None:
    """R27."""
    with bench("legacy-intx") as part:
        assert [part.get(0, 20 + n, 1) for n in range(4)] == [0x11, 0x22, 0x33, 0x44]
        assert part.get(0, 21, 2) == 0x3322
        assert part.get(0, 20, 8) == FIXED << 32 | LEVEL
        assert part.get(0, 255, 1) == 0
        part.put(0, 21, 2, 0xBEEF)
        assert part.get(0, 20, 4) == 0x44BEEF11
        part.put(0, 24, 4, 1)
        assert part.get(0, 24, 4) == FIXED, "not the driver's to write"


def test_a_legacy_ring_is_one_area_named_by_its_page() -> None:
    with bench("legacy-intx") as part:
        part.put(0, 18, 1, SETUP)
        part.put(0, 8, 4, 5)
        part.put(0, 18, 1, SETUP | Status.DRIVER_OK)
        assert part.get(0, 8, 4) == 5
        setup = part.model.queues[0].setup
        assert (setup.desc, setup.driver) == (0x5000, 0x5000 + 16 * 16)
        assert setup.device == 0x6000
        assert part.model.queues[0].ring is not None
        part.put(0, 8, 4, 6)
        assert part.get(0, 8, 4) == 5, "in use"
        part.put(0, 8, 4, 0)
        assert part.get(0, 8, 4) == 0
        assert part.model.queues[0].ring is None


def test_a_legacy_driver_sees_no_more_than_32_features() -> None:
    with bench("legacy-intx") as part:
        part.put(0, 18, 1, SETUP)
        part.put(0, 4, 4, 0xFFFF_FFFF)
        part.put(0, 18, 1, SETUP | Status.DRIVER_OK)
        assert part.model.features == part.model.offered & 0xFFFF_FFFF
        assert part.model.legacy


# Exclusive modes, and R26


@pytest.mark.parametrize("layout", MODERN_STATUS)
def test_the_first_access_picks_the_mode_and_mixing_is_refused(layout: str) -> None:
    """R21: from reset to unknown; then legacy or modern, and no other."""
    bar, at = MODERN_STATUS[layout]
    with bench(layout) as part:
        part.put(0, 18, 1, SETUP)
        assert part.function.statistics().mode == "legacy"
        part.put(bar, at, 1, LIVE)
        assert part.get(bar, at, 1) == 0
        assert part.get(0, 18, 1) == SETUP
        assert part.function.statistics().mixed == 2
        part.put(0, 18, 1, 0)
        assert part.function.statistics().mode == "unknown"
        part.put(bar, at, 1, SETUP)
        assert part.function.statistics().mode == "modern"
        assert (part.get(0, 18, 1), part.get(0, 20, 4)) == (0, 0)
        part.put(0, 18, 1, LIVE)
        assert part.get(bar, at, 1) == SETUP
        assert not part.model.legacy


@pytest.mark.parametrize("layout", MODERN_STATUS)
def test_a_legacy_reset_works_in_every_mode(layout: str) -> None:
    """R26: an older kernel, started by kexec, resets what a newer one drove."""
    bar, at = MODERN_STATUS[layout]
    with bench(layout) as part:
        for place in ((bar, at), (0, 18)):
            part.put(*place, 1, SETUP)
            part.model.accepted = 1
            part.put(0, 18, 1, 0)
            assert part.model.status == 0
            assert part.model.accepted == 0
            assert part.function.statistics().mode == "unknown"
            part.put(*place, 1, SETUP)
            part.put(bar, at, 1, 0)  # and the other way round
            assert part.model.status == 0
        part.put(0, 18, 1, SETUP)
        assert part.get(0, 18, 1) == SETUP


@pytest.mark.parametrize("layout", MODERN_STATUS)
def test_kicks_and_the_isr_serve_both_modes(layout: str) -> None:
    """The proposals have no notification of their own; the ISR may be legacy's."""
    bar, at = MODERN_STATUS[layout]
    for place in ((bar, at), (0, 18)):
        with bench(layout) as part:
            part.put(*place, 1, SETUP)
            part.put(0, 16, 2, 1)
            assert part.model.kicks == [1]
            part.function.transport.queue_interrupt(0)
            assert (part.get(0, 19, 1), part.get(0, 19, 1)) == (1, 0)
            assert part.function.statistics().mixed == 0


# R21


def test_the_four_bars_have_the_new_registers_in_their_order() -> None:
    with bench("four-bar") as part:
        widths = {
            0: 4, 4: 4, 8: 4, 12: 4, 16: 4, 20: 2, 22: 1, 24: 2, 26: 2, 28: 2, 30: 2,
            32: 4, 36: 4,
        }  # fmt: skip
        for at in range(40):
            for size in (1, 2, 4, 8):
                before = part.function.statistics().ignored
                part.get(1, at, size) if at + size <= 40 else None
                known = widths.get(at) == size or at + size > 40
                assert (part.function.statistics().ignored == before) is known, at
        assert part.get(2, 0, 8) == FIXED << 32 | LEVEL
        part.function.transport.isr = 2
        assert (part.get(3, 0, 1), part.get(3, 0, 1)) == (2, 0)


def test_all_ones_say_that_a_queue_does_not_exist() -> None:
    with bench("four-bar") as part:
        assert (part.get(1, 32, 4), part.get(1, 36, 4)) == (0, 0)
        part.put(1, 24, 2, 2)
        assert (part.get(1, 32, 4), part.get(1, 36, 4)) == (0xFFFF_FFFF,) * 2


def test_alignment_and_size_of_a_queue_are_the_drivers_choice() -> None:
    with bench("four-bar") as part:
        part.put(1, 26, 2, 64)
        part.put(1, 28, 2, 8)
        part.put(1, 32, 4, 0x1_0000)
        assert not part.model.queues[0].enabled, "the upper half is still to come"
        part.put(1, 36, 4, 0)
        setup = part.model.queues[0].setup
        end = 0x1_0000 + 16 * 8 + 6 + 2 * 8
        assert setup.addresses == (0x1_0000, 0x1_0000 + 16 * 8, -(-end // 64) * 64)
        assert setup.size == 8
        assert (part.get(1, 32, 4), part.get(1, 36, 4)) == (0x1_0000, 0)
        part.put(1, 36, 4, 0)
        assert not part.model.queues[0].enabled, "0 ends its use"


@pytest.mark.parametrize("alignment", [0, 1, 2, 3, 24, 0xFFFF])
def test_an_alignment_that_is_none_is_refused(alignment: int) -> None:
    with bench("four-bar") as part:
        part.put(1, 26, 2, alignment)
        part.put(1, 32, 4, 0x1_0000)
        part.put(1, 36, 4, 0)
        assert not part.model.queues[0].enabled


# R25


LATCHED = {"four-bar": (1, 16), "offsets": (2, 16), "offsets-table": (2, 12 + 16)}
CONFIG = {"four-bar": (2, 0), "offsets": (2, 2048), "offsets-table": (2, 2048)}


@pytest.mark.parametrize("layout", LATCHED)
def test_the_latch_commits_bytes_1_and_3_and_leaves_byte_2(layout: str) -> None:
    """R25: write 1, write 3, latch: byte 2 is unchanged."""
    bar, at = CONFIG[layout]
    with bench(layout, latch=True) as part:
        part.put(bar, at + 1, 1, 0xAA)
        part.put(bar, at + 3, 1, 0xBB)
        assert part.get(bar, at, 4) == LEVEL
        part.put(*LATCHED[layout], 4, 1)
        assert part.get(bar, at, 4) == 0xBB33AA11


@pytest.mark.parametrize("layout", LATCHED)
def test_the_latch_does_not_overwrite_what_the_device_changed(layout: str) -> None:
    """R25: and the generation tells the driver that it did."""
    bar, at = CONFIG[layout]
    with bench(layout, latch=True) as part:
        before = part.get(*LATCHED[layout], 4)
        part.put(bar, at + 1, 1, 0xAA)
        part.model.change_config(level=0x01020304)
        part.put(*LATCHED[layout], 4, 1)
        assert part.get(bar, at, 4) == 0x01020304
        assert part.get(*LATCHED[layout], 4) == before + 1


@pytest.mark.parametrize("layout", LATCHED)
def test_without_the_latch_writes_take_effect_at_once(layout: str) -> None:
    bar, at = CONFIG[layout]
    with bench(layout) as part:
        part.put(bar, at + 1, 1, 0xAA)
        assert part.get(bar, at, 4) == 0x4433AA11


def test_what_was_not_committed_is_forgotten_by_a_reset() -> None:
    with bench("four-bar", latch=True) as part:
        part.put(2, 1, 1, 0xAA)
        part.put(1, 22, 1, 0)
        part.put(1, 16, 4, 1)
        assert part.get(2, 0, 4) == LEVEL


@pytest.mark.parametrize("latch", [False, True])
def test_a_command_writes_or_reads_the_configuration_in_one_go(latch: bool) -> None:
    """R25: offset, length, read or write; the buffer alone changes nothing."""
    with bench("four-bar-command", latch=latch) as part:
        part.put(2, 0, 4, 1)
        part.put(2, 4, 4, 2)
        part.put(2, 12, 2, 0xBEEF)
        assert part.model.read_config(0, 4) == struct.pack("<I", LEVEL)
        part.put(2, 8, 4, 2)
        assert part.model.read_config(0, 4) == struct.pack("<I", 0x44BEEF11)
        part.put(2, 12, 4, 0)
        part.put(2, 0, 4, 0)
        part.put(2, 4, 4, 8)
        assert part.get(2, 12, 4) == 0
        part.put(2, 8, 4, 1)
        assert part.get(2, 12, 8) == FIXED << 32 | 0x44BEEF11


def test_commands_that_there_are_not_do_nothing() -> None:
    with bench("four-bar-command") as part:
        before = part.function.statistics().ignored
        for offset, length, command in ((0, 257, 1), (0, 1 << 31, 2), (0, 4, 3)):
            part.put(2, 0, 4, offset)
            part.put(2, 4, 4, length)
            part.put(2, 8, 4, command)
        assert part.function.statistics().ignored == before + 3
        part.put(2, 0, 4, 0xFFFF_FFFF)
        part.put(2, 4, 4, 4)
        part.put(2, 8, 4, 1)
        assert part.get(2, 12, 4) == 0, "zeros behind the end"
        for at in range(12 + 250, 12 + 262):  # the end of the buffer
            part.put(2, at, 8, 0xFFFF_FFFF_FFFF_FFFF)
            part.get(2, at, 8)
        assert part.model.read_config(0, 4) == struct.pack("<I", LEVEL)


# R22


def test_the_mirror_never_has_the_overlay() -> None:
    """R22: BAR 1 shows the vectors and what legacy lacks; BAR 2 the configuration."""
    with bench("mirrored") as part:
        part.put(1, 20, 2, 1)
        part.put(1, 24, 4, 1)
        assert part.get(1, 20, 2) == 1
        assert part.get(1, 0, 4) == part.model.offered >> 32
        assert part.get(0, 20, 4) == LEVEL, "the overlay"
        assert part.get(2, 0, 4) == LEVEL


def test_the_overlay_is_latched_away_until_the_reset() -> None:
    """R22: by accepting that the configuration is elsewhere."""
    with bench("mirrored") as part:
        assert part.get(1, 0, 4) & SEPARATE_CONFIG
        part.put(0, 18, 1, SETUP)
        part.put(0, 4, 4, 1)
        assert part.get(0, 20, 4) == LEVEL
        part.put(0, 4, 4, SEPARATE_CONFIG | 1)
        assert part.get(0, 20, 2) == NO_VECTOR
        assert part.get(0, 28, 4) == 0, "guest_feature_select"
        part.put(0, 4, 4, 1)
        assert part.get(0, 20, 2) == NO_VECTOR, "latched"
        part.put(0, 18, 1, 0)
        assert part.get(0, 20, 4) == LEVEL


def test_the_upper_half_of_a_page_comes_first() -> None:
    with bench("mirrored") as part:
        part.put(1, 32, 4, 2)
        part.put(1, 8, 4, 5)
        assert part.model.queues[0].setup.desc == (2 << 32 | 5) << 12
        assert (part.get(1, 32, 4), part.get(1, 8, 4)) == (2, 5)
        part.put(1, 8, 4, 0)
        part.put(1, 8, 4, 6)
        assert part.model.queues[0].setup.desc == 6 << 12


@pytest.mark.parametrize("modern", [False, True])
def test_version_1_tells_a_modern_driver_of_the_mirrored_layout(modern: bool) -> None:
    with bench("mirrored") as part:
        part.put(1, 18, 1, SETUP)
        part.put(1, 28, 4, 1)
        part.put(1, 4, 4, int(modern))
        part.put(1, 18, 1, SETUP | Status.DRIVER_OK)
        assert part.model.legacy is not modern
        assert bool(part.get(1, 18, 1) & Status.DRIVER_OK) is not modern
        if modern:
            part.put(1, 18, 1, LIVE)
            assert part.get(1, 18, 1) == LIVE


# Configuration space as a way to the BARs


def access(part: Bench, bar: int, offset: int, length: int) -> int:
    """Point the window; give where its data are."""
    space = part.function.config.read(0, 256)
    at = space[0x34]
    while space[at] != 9 or space[at + 3] != 5:
        at = space[at + 1]
    part.put(Region.CONFIG, at + 4, 1, bar)
    part.put(Region.CONFIG, at + 8, 4, offset)
    part.put(Region.CONFIG, at + 12, 4, length)
    return at + 16


def test_configuration_space_reaches_the_registers() -> None:
    """4.1.4.9: for firmware that cannot map the BAR."""
    with bench("modern") as part:
        data = access(part, 4, 20, 1)
        part.put(Region.CONFIG, data, 1, SETUP)
        assert part.model.status == SETUP
        assert part.get(Region.CONFIG, data, 4) & 0xFF == SETUP
        data = access(part, 4, 0x2000, 4)
        assert part.get(Region.CONFIG, data, 4) == LEVEL
        data = access(part, 4, 0x3004, 2)
        part.put(Region.CONFIG, data, 2, 1)
        assert part.model.kicks == [1]


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (4, 0, 0), (4, 0, 3), (4, 0, 8), (4, 1, 2), (4, 0x4000, 4), (4, 0x3FFE, 4),
        (1, 0, 4), (0, 0, 4), (5, 0, 4), (255, 0, 4), (4, 0xFFFF_FFFC, 4),
    ],
)  # fmt: skip
def test_a_place_that_is_none_is_not_reached(
    bar: int, offset: int, length: int
) -> None:
    with bench("modern") as part:
        before = part.function.statistics()
        data = access(part, bar, offset, length)
        part.put(Region.CONFIG, data, 4, 0x5A5A5A5A)
        assert part.get(Region.CONFIG, data, 4) == 0x5A5A5A5A, "it is memory"
        assert part.function.statistics() == before


def test_looking_at_other_configuration_has_no_effect_on_the_place() -> None:
    with bench("modern") as part:
        part.function.transport.isr = 1
        data = access(part, 4, 0x1000, 1)
        for at in range(0, 256, 4):
            if at != data:
                part.get(Region.CONFIG, at, 4)
        assert part.function.transport.isr == 1
        assert part.get(Region.CONFIG, data, 1) == 1
        assert part.function.transport.isr == 0
