"""Images that are block devices; writes tried at once: where they seldom wait."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.virtio.image import DiskImage, Pace

PAGE = 4096


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Moves:
    """Stands for a chain: a kernel that cannot say whether it would wait."""

    def __init__(self, *, can_refuse: bool = False, error: int = 0) -> None:
        self.can_refuse = can_refuse
        self.error = error
        self.flags: list[int] = []

    def __call__(self, fd: int, offset: int, at: int, size: int, flags: int) -> int:
        self.flags.append(flags)
        if flags and not self.can_refuse:
            raise OSError(errno.EOPNOTSUPP, "")
        if self.error:
            raise OSError(self.error, "")
        return size


@pytest.fixture
def image(tmp_path: Path) -> Iterator[DiskImage]:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 16 * PAGE)
    with DiskImage(path) as image:
        yield image


def test_a_pause_follows_what_waited_and_grows_while_it_does() -> None:
    clock = Clock()
    pace = Pace(clock)
    pauses = []
    for _ in range(12):
        assert pace.good()
        pace.learn(Pace.SLOW_S)
        began = clock.now
        while not pace.good():
            clock.now = round(clock.now + 0.01, 2)
        pauses.append(clock.now - began)
    assert pauses[:3] == pytest.approx([0.1, 0.2, 0.4], abs=0.02)
    assert pauses[-1] == pytest.approx(Pace.LONGEST_PAUSE_S, rel=0.01)
    pace.learn(0)
    pace.learn(Pace.SLOW_S)
    clock.now += Pace.FIRST_PAUSE_S + 0.01
    assert pace.good(), "short again after it went well"


def test_a_kernel_that_can_refuse_is_always_asked(image: DiskImage) -> None:
    moves = Moves(can_refuse=True)
    assert image.write_at_once(moves, 512, 16, 512)
    assert moves.flags == [os.RWF_NOWAIT]
    moves.error = errno.EAGAIN
    assert not image.write_at_once(moves, 0, 16, PAGE)
    moves.error = 0
    assert image.write_at_once(moves, 0, 16, PAGE)
    assert set(moves.flags) == {os.RWF_NOWAIT}


def test_a_kernel_that_cannot_refuse_is_asked_once(image: DiskImage) -> None:
    moves = Moves()
    assert not image.write_at_once(moves, 0, 16, PAGE)
    assert image.write_at_once(moves, 0, 16, PAGE)
    assert moves.flags == [os.RWF_NOWAIT, 0]


@pytest.mark.parametrize(
    ("offset", "size"), [(512, PAGE), (0, 512), (PAGE, PAGE + 512)]
)
def test_parts_of_pages_might_have_to_be_read_first(
    image: DiskImage, offset: int, size: int
) -> None:
    """So they are left to a thread where the kernel cannot refuse."""
    moves = Moves()
    image.write_at_once(moves, 0, 16, PAGE)
    assert not image.write_at_once(moves, offset, 16, size)
    assert moves.flags == [os.RWF_NOWAIT]


def test_after_a_write_that_waited_the_next_ones_are_left_to_threads(
    image: DiskImage,
) -> None:
    """A slow disk holds the others up for one write, and then not for a while."""
    moves = Moves()
    image.write_at_once(moves, 0, 16, PAGE)
    image._pace.learn(Pace.SLOW_S)
    assert not image.write_at_once(moves, 0, 16, PAGE)
    assert moves.flags == [os.RWF_NOWAIT]


def test_an_error_is_left_to_the_thread_to_report(image: DiskImage) -> None:
    moves = Moves(error=errno.ENOSPC)
    image.write_at_once(moves, 0, 16, PAGE)
    assert not image.write_at_once(moves, 0, 16, PAGE)


@pytest.mark.parametrize("waits", [False, True])
def test_only_a_write_that_slept_is_slow(
    image: DiskImage, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """A process that lost its core meanwhile did not wait for the disk."""
    monkeypatch.setattr(Pace, "SLOW_S", 1e-9)
    moves = Moves()
    image.write_at_once(moves, 0, 16, PAGE)

    def move(fd: int, offset: int, at: int, size: int, flags: int) -> int:
        if waits:
            time.sleep(0.001)
        return size

    assert image.write_at_once(move, 0, 16, PAGE)
    assert image._pace.good() is not waits


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A block device of this machine, where it gives us one."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    command = ["losetup", "--find", "--show", str(backing)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no losetup")
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    node = done.stdout.strip()
    yield Path(node)
    subprocess.run(["losetup", "--detach", node], check=True)


def test_a_block_device_is_as_good_as_a_file(loop: Path) -> None:
    data = bytes(range(256)) * 64
    with DiskImage(loop) as image:
        assert image.is_block_device
        assert image.sectors() == (1 << 20) // 512
        image.write(8192, data, durable=True)
        image.flush()
        assert image.read(8192, len(data)) == data
        image.write_zeroes(12288, 4096, unmap=False, durable=True)
        image.discard(16384, 4096)
        assert image.read(8192, 8192) == data[:4096] + bytes(4096)
