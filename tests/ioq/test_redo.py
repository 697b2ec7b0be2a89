"""Finishing a push or pop of descriptors in which another process died."""

import ctypes
import mmap
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shm import create_memfd
from tests.ioq.model import Model

ROOT = Path(__file__).parents[2]
HEAD, TAIL = 0, 1
INDEX = 36
"""Where the head of the inuse index lies; the tail and `full` follow."""
NORTH, SOUTH = 0, 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("redo") / "redo.so"
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared"]
    includes = [f"-I{ROOT / each}" for each in ("shm/include", "ioq/include")]
    source = str(Path(__file__).parent / "redo_steps.c")
    command = ["gcc", *options, "-fPIC", *includes, source, "-o", str(built)]
    subprocess.run(command, check=True, timeout=120)
    loaded = ctypes.CDLL(str(built))
    loaded.end_new.restype = ctypes.c_void_p
    loaded.end_ours.restype = loaded.end_position.restype = ctypes.c_uint32
    return loaded


class North:
    """The guest, which moves its own end first, then gives a descriptor away."""

    def __init__(self, count: int, end: int) -> None:
        self.count, self.end = count, end
        model = Model(count)
        self.size = len(model.memory)
        self.fd = create_memfd("ring", 1 << 16)
        self.memory = mmap.mmap(self.fd, 1 << 16)
        self.memory[: self.size] = bytes(model.memory)
        self.at = self.moved = 0
        self.half: int | None = None
        if end == TAIL:  # buffers: all posted
            for at in range(count):
                self.give(at)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)

    def sown(self, at: int) -> int:
        return self.memory[56 + 32 * at + 25]

    def give(self, at: int) -> None:
        self.memory[56 + 32 * at + 25] = SOUTH

    def number(self, at: int) -> int:
        """What was written into a descriptor, by either side."""
        (number,) = struct.unpack_from("<Q", self.memory, 56 + 32 * at)
        assert isinstance(number, int)
        return number

    def write(self, at: int, number: int) -> None:
        struct.pack_into("<Q", self.memory, 56 + 32 * at, number)

    def step(self, *, half: bool = False) -> None:
        """Push one (the device pops), or pop one (it pushes), if that is possible."""
        self.finish()
        at = self.at
        if self.sown(at) != NORTH:
            return
        if self.end == HEAD:
            self.write(at, self.moved)
        else:
            assert self.number(at) == self.moved, "a buffer that is lost, or twice"
        self.moved += 1
        self.at = (at + 1) % self.count
        peer = 1 - self.end
        struct.pack_into("<I", self.memory, INDEX + 4 * peer, self.at)
        self.half = at
        if not half:
            self.finish()

    def finish(self) -> None:
        if self.half is not None:
            self.give(self.half)
            self.half = None


ROUNDS = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.integers(1, 7),
        st.integers(-1, 8),
        st.integers(0, 9),
        st.booleans(),
    ),
    min_size=1,
    max_size=20,
)
"""Each: steps of the guest; descriptors to move, and how many are handed on before the
process dies; steps of the guest until the next comes, the last of them half done."""


@pytest.mark.parametrize("end", [HEAD, TAIL], ids=["pop", "push"])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(count=st.integers(2, 8), rounds=ROUNDS)
def test_every_descriptor_is_handed_on_once_wherever_the_process_dies(
    library: ctypes.CDLL,
    end: int,
    count: int,
    rounds: list[tuple[int, int, int, int, bool]],
) -> None:
    """Issue 6: no descriptor is lost, none taken from the guest, no ring stuck."""
    north = North(count, end)
    device = attach(library, north)
    moved = 0
    for before, wanted, flips, between, half in rounds:
        for _ in range(before):
            north.step()
        n = min(library.end_ours(device, end), wanted, count - 1)
        first = library.end_position(device, end)
        for nth in range(n):
            at = (first + nth) % count
            if end == HEAD:
                assert north.number(at) == moved + nth, "lost, or twice"
            else:
                north.write(at, moved + nth)
        moved += n
        assert library.end_move(device, end, n, flips) == 0
        library.end_free(device)
        for nth in range(between):
            north.step(half=half and nth == between - 1)
        device = attach(library, north)
        assert n == 0 or library.end_redo(device, end, first, n) == 0
        north.finish()
        assert library.end_position(device, end) == moved % count
        out = north.moved - moved if end == HEAD else count - (moved - north.moved)
        assert sum(north.sown(at) == SOUTH for at in range(count)) == out
    library.end_free(device)
    north.close()


def attach(library: ctypes.CDLL, north: North) -> ctypes.c_void_p:
    made = library.end_new(
        north.fd, ctypes.c_uint64(1 << 16), ctypes.c_uint64(north.size)
    )
    assert made
    return ctypes.c_void_p(made)
