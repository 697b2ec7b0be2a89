"""The guest's memory: what may be mapped, what can be reached, what ends with unmap."""

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm import AddressSpace, Region, View, create_memfd
from shm.errors import (
    ExistsError,
    FaultError,
    InvalidError,
    NoSpaceError,
    PermissionDeniedError,
)

PAGE = mmap.PAGESIZE
TOP = 2**64


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_memfd("guest", 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def space() -> Iterator[AddressSpace]:
    space = AddressSpace()
    yield space
    space.close()


def two_regions(space: AddressSpace, fd: int) -> None:
    """[1, 3) pages from the file's page 0, [3, 5) from its page 8."""
    space.map(PAGE, 2 * PAGE, fd)
    space.map(3 * PAGE, 2 * PAGE, fd, 8 * PAGE)


def test_a_created_memfd_cannot_be_resized() -> None:
    fd = create_memfd("sealed", PAGE)
    try:
        for size in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_what_is_written_is_in_the_file(space: AddressSpace, fd: int) -> None:
    """R50: the function and the guest see the same bytes."""
    space.map(0x10000, PAGE, fd, PAGE)
    space.write(0x10010, b"hello")
    assert os.pread(fd, 5, PAGE + 0x10) == b"hello"
    os.pwrite(fd, b"HELLO", PAGE + 0x10)
    assert space.read(0x10010, 5) == b"HELLO"
    into = bytearray(3)
    space.read_into(0x10012, into)
    assert into == b"LLO"


def test_copies_cross_borders(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    data = bytes(range(256))
    space.write(3 * PAGE - 100, data)
    assert space.read(3 * PAGE - 100, 256) == data
    assert os.pread(fd, 100, 2 * PAGE - 100) == data[:100]
    assert os.pread(fd, 156, 8 * PAGE) == data[100:]


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0, 1),
        (PAGE - 1, 2),
        (5 * PAGE - 1, 2),
        (5 * PAGE, 1),
        (PAGE, 4 * PAGE + 1),
        (PAGE, TOP - 1),
        (TOP - 1, 2),
        (TOP - 1, TOP - 1),
        (TOP + PAGE, 4),
        (PAGE, TOP + 4),
        (-1, 1),
    ],
)
def test_what_is_not_mapped_cannot_be_reached(
    space: AddressSpace, fd: int, addr: int, size: int
) -> None:
    """R50: one byte outside refuses all of it, before any memory is allocated."""
    two_regions(space, fd)
    with pytest.raises(FaultError):
        space.read(addr, size)
    with pytest.raises(FaultError):
        space.view(addr, size)


def test_a_refused_write_changes_nothing(space: AddressSpace, fd: int) -> None:
    """R50: all or nothing."""
    two_regions(space, fd)
    with pytest.raises(FaultError):
        space.write(5 * PAGE - 4, b"12345678")
    assert space.read(5 * PAGE - 4, 4) == bytes(4)


def test_a_copy_of_nothing_is_always_possible(space: AddressSpace) -> None:
    assert space.read(0x1234, 0) == b""
    space.write(TOP - 1, b"")


def test_read_only_memory_is_not_written(space: AddressSpace, fd: int) -> None:
    space.map(0, PAGE, fd, writable=False)
    assert space.read(0, 4) == bytes(4)
    with pytest.raises(FaultError):
        space.write(0, b"x")
    with pytest.raises(FaultError):
        space.view(0, 4)
    view = space.view(0, 4, writable=False)
    with pytest.raises(PermissionDeniedError):
        view.write(0, b"x")


def test_a_region_without_fd_is_known_but_no_memory(
    space: AddressSpace, fd: int
) -> None:
    space.map(0, PAGE, None)
    assert space.regions() == [Region(0, PAGE, True, False)]
    with pytest.raises(FaultError):
        space.read(0, 1)
    with pytest.raises(ExistsError):
        space.map(0, PAGE, fd)
    space.map(PAGE, PAGE, fd)
    with pytest.raises(FaultError):
        space.read(PAGE - 1, 2)


@pytest.mark.parametrize(
    ("addr", "size"),
    [(0, 0), (PAGE, TOP - PAGE), (TOP - PAGE, 2 * PAGE), (0, TOP - 1)],
)
def test_empty_wrapping_and_absurd_ranges_are_refused(
    space: AddressSpace, fd: int, addr: int, size: int
) -> None:
    with pytest.raises(InvalidError):
        space.map(addr, size, fd)
    assert space.regions() == []


def test_memory_may_touch_the_top_of_the_address_space(
    space: AddressSpace, fd: int
) -> None:
    space.map(TOP - PAGE, PAGE, fd)
    space.write(TOP - 4, b"last")
    assert space.read(TOP - 4, 4) == b"last"
    with pytest.raises(FaultError):
        space.read(TOP - 4, 5)
    assert space.unmap(TOP - PAGE, PAGE) == 1


@pytest.mark.parametrize(
    ("addr", "size"),
    [(PAGE, PAGE), (0, PAGE + 1), (0, 8 * PAGE), (2 * PAGE, PAGE), (5 * PAGE - 1, 1)],
)
def test_overlapping_maps_are_refused(
    space: AddressSpace, fd: int, addr: int, size: int
) -> None:
    two_regions(space, fd)
    with pytest.raises(ExistsError):
        space.map(addr, size, fd)
    assert len(space.regions()) == 2


@pytest.mark.parametrize("offset", [1, PAGE - 1, 2**63, 2**64 - PAGE, 2**64])
def test_a_bad_offset_is_refused(space: AddressSpace, fd: int, offset: int) -> None:
    with pytest.raises(InvalidError):
        space.map(0, PAGE, fd, offset)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 16 * PAGE + 1), (15 * PAGE, PAGE + 1)]
)
def test_a_file_shorter_than_the_map_is_refused(
    space: AddressSpace, fd: int, offset: int, size: int
) -> None:
    """R50: touching what the file does not have would end the process."""
    with pytest.raises(InvalidError, match="the memory file ends at"):
        space.map(0, size, fd, offset)


def test_a_memfd_that_can_shrink_is_refused(space: AddressSpace) -> None:
    """R50: the message names what to tell QEMU."""
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        with pytest.raises(PermissionDeniedError, match="seal=on"):
            space.map(0, PAGE, fd)
        space.map(0, PAGE, fd, allow_truncatable=True)
    finally:
        os.close(fd)


def test_files_that_cannot_be_sealed_are_refused(
    space: AddressSpace, tmp_path: Path
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file:
        with pytest.raises(PermissionDeniedError, match="seal=on"):
            space.map(0, PAGE, file.fileno())
        space.map(0, PAGE, file.fileno(), allow_truncatable=True)


def test_what_is_no_file_is_refused(space: AddressSpace) -> None:
    fd = os.eventfd(0)
    try:
        with pytest.raises(InvalidError, match="regular file"):
            space.map(0, PAGE, fd, allow_truncatable=True)
    finally:
        os.close(fd)


def test_a_file_sealed_against_writing_cannot_be_mapped_writable(
    space: AddressSpace,
) -> None:
    fd = os.memfd_create("frozen", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(PermissionDeniedError):
            space.map(0, PAGE, fd)
    finally:
        os.close(fd)


def test_unmap_removes_whole_regions_only(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    for addr, size in [(0, 2 * PAGE), (2 * PAGE, 8 * PAGE), (2 * PAGE, PAGE)]:
        with pytest.raises(InvalidError, match="cut a region"):
            space.unmap(addr, size)
    assert len(space.regions()) == 2
    assert space.unmap(5 * PAGE, PAGE) == 0
    assert space.unmap(0, 0) == 0
    assert space.unmap(3 * PAGE, 2 * PAGE) == 1
    assert space.read(3 * PAGE - 4, 4) == bytes(4)
    with pytest.raises(FaultError):
        space.read(3 * PAGE - 4, 5)
    assert space.unmap(0, TOP - 1) == 1
    assert space.regions() == []


def test_a_view_is_the_same_memory(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    view = space.view(PAGE + 8, 16)
    assert (view.addr, view.size, view.alive, view.writable) == (
        PAGE + 8,
        16,
        True,
        True,
    )
    view.write(4, b"abcd")
    assert space.read(PAGE + 12, 4) == b"abcd"
    assert view.read() == bytes(4) + b"abcd" + bytes(8)
    assert (view.read(6), view.read(4, 2)) == (b"cd" + bytes(8), b"ab")
    into = bytearray(2)
    view.read_into(5, into)
    assert into == b"bc"


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (17, 1), (TOP - 1, 2)])
def test_a_view_ends_where_it_ends(
    space: AddressSpace, fd: int, offset: int, size: int
) -> None:
    """R50: no offset reaches beyond the view."""
    two_regions(space, fd)
    view = space.view(PAGE, 16)
    with pytest.raises(InvalidError):
        view.read(offset, size)
    with pytest.raises(InvalidError):
        view.write(offset, bytes(min(size, 17)))


def test_a_view_across_a_border_is_one_piece(space: AddressSpace, fd: int) -> None:
    """R50: both mappings of the same pages show the same bytes."""
    two_regions(space, fd)
    view = space.view(2 * PAGE + 50, 2 * PAGE)
    data = bytes(i % 251 for i in range(2 * PAGE))
    view.write(0, data)
    assert space.read(2 * PAGE + 50, 2 * PAGE) == data
    space.write(3 * PAGE - 2, b"over")
    assert view.read(PAGE - 52, 4) == b"over"
    assert os.pread(fd, 2, 8 * PAGE) == b"er"


def test_a_view_over_three_regions(space: AddressSpace, fd: int) -> None:
    for page in range(3):
        space.map(page * PAGE, PAGE, fd, (10 - 2 * page) * PAGE)
    view = space.view(PAGE - 1, PAGE + 2)
    view.write(0, b"a" + b"b" * PAGE + b"c")
    assert os.pread(fd, 1, 11 * PAGE - 1) == b"a"
    assert os.pread(fd, PAGE, 8 * PAGE) == b"b" * PAGE
    assert os.pread(fd, 1, 6 * PAGE) == b"c"


def test_regions_that_meet_off_page_borders_are_no_one_piece(
    space: AddressSpace, fd: int
) -> None:
    space.map(0, 100, fd)
    space.map(100, 100, fd, PAGE)
    space.write(98, b"abcd")
    assert space.read(98, 4) == b"abcd"
    with pytest.raises(InvalidError, match="one piece"):
        space.view(98, 4)


@pytest.mark.parametrize("gone", [1, 3])
def test_a_view_ends_with_any_part_of_it(
    space: AddressSpace, fd: int, gone: int
) -> None:
    """R50: after an unmap nothing of the guest can be reached through old views."""
    two_regions(space, fd)
    view = space.view(3 * PAGE - 8, 16)
    other = space.view((4 - gone) * PAGE, 16)
    space.unmap(gone * PAGE, 2 * PAGE)
    assert not view.alive
    for use in (lambda: view.read(0, 1), lambda: view.write(0, b"x"), view.read):
        with pytest.raises(FaultError):
            use()
    assert other.alive
    other.write(0, b"still here")
    # The same addresses mapped anew do not bring it back to life.
    space.map(gone * PAGE, 2 * PAGE, fd)
    with pytest.raises(FaultError):
        view.read()


def test_a_closed_view_is_dead(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    view = space.view(PAGE, 8)
    view.close()
    view.close()
    with pytest.raises(FaultError):
        view.read()


def test_a_view_outlives_its_space() -> None:
    """R50: the last reference to a space unmaps; a view is then dead, not dangling."""
    fd = create_memfd("guest", PAGE)
    space = AddressSpace()
    space.map(0, PAGE, fd)
    os.close(fd)
    view = space.view(0, 8)
    del space
    with pytest.raises(FaultError):
        view.read()


def test_an_empty_view_is_refused(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    with pytest.raises(InvalidError):
        View(space, PAGE, 0)


def test_a_view_has_a_limit_of_parts(space: AddressSpace, fd: int) -> None:
    """R50: a guest cannot multiply the host's mappings through views."""
    for i in range(1025):
        space.map(i * PAGE, PAGE, fd)
    space.view(0, 1024 * PAGE).close()
    with pytest.raises(InvalidError, match="one piece"):
        space.view(0, 1025 * PAGE)


def test_a_space_has_a_limit_of_regions(space: AddressSpace) -> None:
    """R50: a guest cannot use up the host's mappings."""
    limit = 32768
    for i in range(limit):
        space.map(i * PAGE, PAGE, None)
    with pytest.raises(NoSpaceError):
        space.map(limit * PAGE, PAGE, None)
    assert space.statistics().regions == limit


def test_statistics_count_mappings_and_faults(space: AddressSpace, fd: int) -> None:
    two_regions(space, fd)
    space.map(0x100000, PAGE, None)
    before = space.statistics()
    assert (before.regions, before.mapped_bytes) == (3, 4 * PAGE)
    with pytest.raises(FaultError):
        space.read(0, 1)
    space.unmap(PAGE, 2 * PAGE)
    after = space.statistics()
    assert after.faults == before.faults + 1
    assert after.generation > before.generation
    assert after.mapped_bytes == 2 * PAGE


def test_nothing_leaks() -> None:
    """R50: maps, refusals and views leave fds and mappings as they were."""
    fd = create_memfd("guest", 16 * PAGE)
    state = (os.listdir("/proc/self/fd"), Path("/proc/self/maps").read_text())
    for _ in range(50):
        space = AddressSpace()
        two_regions(space, fd)
        views = [space.view(3 * PAGE - 1, 2), space.view(PAGE, 1)]
        with pytest.raises(ExistsError):
            space.map(0, 8 * PAGE, fd)
        with pytest.raises(InvalidError):
            space.map(0, 17 * PAGE, fd)
        space.unmap(PAGE, 2 * PAGE)
        views[0].close()
        space.close()
        del views
    names, maps = state
    assert len(os.listdir("/proc/self/fd")) == len(names)
    assert Path("/proc/self/maps").read_text().count("memfd:guest") == maps.count(
        "memfd:guest"
    )
    os.close(fd)


ranges = st.tuples(st.integers(0, 12), st.integers(1, 5))


@given(st.lists(st.tuples(st.sampled_from(["map", "unmap"]), ranges), max_size=30))
def test_the_table_is_what_a_dictionary_of_pages_says(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    """R50: any sequence of maps and unmaps, checked byte by byte of every page."""
    fd = create_memfd("guest", 32 * PAGE)
    space = AddressSpace()
    model: dict[int, int] = {}  # page -> first page of its region
    for what, (at, pages) in steps:
        span = range(at, at + pages)
        regions = {model[page] for page in span if page in model}
        if what == "map":
            if regions:
                with pytest.raises(ExistsError):
                    space.map(at * PAGE, pages * PAGE, fd)
            else:
                space.map(at * PAGE, pages * PAGE, fd)
                model.update(dict.fromkeys(span, at))
            continue
        whole = {page for page, start in model.items() if start in regions}
        if whole <= set(span):
            assert space.unmap(at * PAGE, pages * PAGE) == len(regions)
            model = {page: s for page, s in model.items() if page not in whole}
        else:
            with pytest.raises(InvalidError):
                space.unmap(at * PAGE, pages * PAGE)
    for page in range(20):
        if page in model:
            assert space.read(page * PAGE + 7, 1) is not None
        else:
            with pytest.raises(FaultError):
                space.read(page * PAGE + 7, 1)
    space.close()
    os.close(fd)
