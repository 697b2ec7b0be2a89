"""Guests that touch registers as no driver would, in every layout."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.virtio.pci import LAYOUTS
from tests.backends.virtio.pci.registers import LIVE, SETUP, Bench, bench
from vbus.errors import InvalidError
from vbus.pci.constants import REGION_COUNT, Region
from vbus.virtio.common import Status

EDGES = (0, 1, 7, 16, 17, 64, 0x1000, 0xFFFF, 0xFFFFF000, 0xFFFFFFFF)


def values(size: int) -> st.SearchStrategy[bytes]:
    """Bytes, often those of small or telling numbers."""
    mask = (1 << 8 * size) - 1
    telling = st.sampled_from((*EDGES, SETUP, LIVE, 1 << 32)).map(
        lambda value: (value & mask).to_bytes(size, "little")
    )
    return telling | st.binary(min_size=size, max_size=size)


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, int, int, bytes | None]:
    """Region, offset, size, and what is written; often where registers are."""
    region = draw(st.sampled_from([*range(5), Region.CONFIG]) | st.integers(0, 8))
    near = st.integers(0, 64)
    offset = draw(
        near
        | st.integers(0x3000, 0x3010)
        | st.sampled_from((0x1000, 0x2000, 0x800, 0x3FFF))
        | st.integers(-4, 1 << 17)
    )
    size = draw(st.sampled_from((1, 2, 4, 8)) | st.integers(0, 300))
    written = draw(values(size)) if draw(st.booleans()) else None
    return region, offset, size, written


def apply(part: Bench, access: tuple[int, int, int, bytes | None]) -> None:
    region, offset, size, written = access
    try:
        if written is not None:
            part.function.write(region, offset, written)
        else:
            data = part.function.read(region, offset, size)
            assert isinstance(data, bytes)
            assert len(data) == size
    except InvalidError:
        bar = part.function.config.bars.get(region)
        limit = 256 if region == Region.CONFIG else bar.size if bar else 0
        assert offset < 0 or size == 0 or offset + size > limit, "refused inside"


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=50, deadline=None)
@given(sequence=st.lists(accesses(), max_size=60))
def test_no_access_breaks_more_than_the_device(
    layout: str, sequence: list[tuple[int, int, int, bytes | None]]
) -> None:
    """Any size, offset and alignment: refused outside of regions, else an answer of
    that size; after a reset the device is as new."""
    with bench(layout, latch=layout == "four-bar") as part:
        for access in sequence:
            apply(part, access)
        for index in range(REGION_COUNT):
            part.function.region(index)
        part.function.statistics()
        part.function.reset()
        part.command(0b111)
        assert part.model.status == 0
        assert part.model.broken is None
        assert not any(queue.enabled for queue in part.model.queues)
        assert part.function.transport.queue_vectors == [0xFFFF] * 2


def test_a_ring_outside_of_memory_breaks_the_device_until_a_reset() -> None:
    """R50: DEVICE_NEEDS_RESET, told by an interrupt; the next driver goes on."""
    with bench("legacy-intx") as part:
        part.put(0, 18, 1, SETUP)
        part.put(0, 8, 4, 0xFFFF_FFFF)
        part.put(0, 18, 1, SETUP | Status.DRIVER_OK)
        assert part.get(0, 18, 1) & Status.NEEDS_RESET
        assert part.get(0, 19, 1) == 2
        part.put(0, 16, 2, 0)
        part.put(0, 18, 1, 0)
        part.put(0, 18, 1, SETUP)
        part.put(0, 8, 4, 1)
        part.put(0, 18, 1, SETUP | Status.DRIVER_OK)
        assert part.get(0, 18, 1) == SETUP | Status.DRIVER_OK
