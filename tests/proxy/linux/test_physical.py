"""Huge pages by physical address: what can be tested without them.

The rest is tests/vm/test_guest_run.py.
"""

from pathlib import Path

import pytest

from proxy.linux.physical import RangesAllocator, merge, reserve
from proxy.memory import HUGE_PAGE_SIZE
from vbus.errors import InvalidError, NoSpaceError

MB = 1 << 20


def pool(folder: Path, total: int, free: int) -> Path:
    (folder / "nr_hugepages").write_text(f"{total}\n")
    (folder / "free_hugepages").write_text(f"{free}\n")
    return folder


def test_pages_that_follow_each_other_are_one_range() -> None:
    size = HUGE_PAGE_SIZE
    assert merge([8 * size, 9 * size, 10 * size]) == [(8 * size, 3 * size)]
    # Downwards they are apart in the file, so apart.
    assert merge([9 * size, 8 * size]) == [(9 * size, size), (8 * size, size)]
    assert merge([0, 2 * size]) == [(0, size), (2 * size, size)]


def test_no_buffer_crosses_ranges_even_if_they_touch() -> None:
    allocator = RangesAllocator([(4 * MB, 2 * MB), (2 * MB, 2 * MB)])
    with pytest.raises(NoSpaceError, match="the largest piece has 2097152"):
        allocator.allocate(2 * MB + 1)
    assert {allocator.allocate(2 * MB), allocator.allocate(2 * MB)} == {2 * MB, 4 * MB}
    assert (allocator.used, allocator.allocations) == (4 * MB, 2)
    allocator.free(2 * MB)
    allocator.free(4 * MB)
    assert (allocator.used, allocator.largest_hole) == (0, 2 * MB)
    with pytest.raises(NoSpaceError):
        allocator.allocate(2 * MB + 1)


def test_small_buffers_spare_the_largest_range() -> None:
    allocator = RangesAllocator([(64 * MB, 16 * MB), (8 * MB, 2 * MB)])
    assert allocator.allocate(4096) == 8 * MB
    assert allocator.allocate(16 * MB) == 64 * MB


@pytest.mark.parametrize("address", [0, 8 * MB, 8 * MB + 64])
def test_only_what_was_given_is_taken_back(address: int) -> None:
    allocator = RangesAllocator([(8 * MB, 2 * MB)])
    with pytest.raises(InvalidError, match="nothing is allocated"):
        allocator.free(address)


def test_enough_free_pages_are_left_alone(tmp_path: Path) -> None:
    reserve(3, pool(tmp_path, 10, 3))
    assert (tmp_path / "nr_hugepages").read_text() == "10\n"


def meminfo(folder: Path, available: int) -> Path:
    (folder / "meminfo").write_text(
        f"MemTotal: 999999 kB\nMemAvailable: {available >> 10} kB\n"
    )
    return folder / "meminfo"


@pytest.mark.parametrize(
    ("available", "asked"), [(60 * MB, []), (68 * MB, []), (80 * MB, ["38", "8"])]
)
def test_missing_pages_are_asked_for_but_not_at_the_cost_of_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, asked: list[str]
) -> None:
    """What the kernel found of them, too few, it gets back; the command is told."""
    fake, meminfo = pool(tmp_path, 8, 2), tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 999999 kB\nMemAvailable: {available >> 10} kB\n")
    written: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda _, text: written.append(text))
    with pytest.raises(NoSpaceError, match=r"32 huge.* 2 are free.*nr_hugepages=38$"):
        reserve(32, fake, meminfo)
    assert written == asked


def test_a_kernel_without_huge_pages_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="no huge pages"):
        reserve(1, tmp_path / "none")
