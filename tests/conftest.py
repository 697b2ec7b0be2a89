"""Fixtures for every test."""

import gc
import os
from collections.abc import Iterator

import pytest


def open_fds() -> dict[int, str]:
    """The file descriptors this process has open, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed the folder
    return found


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """Fail the test if it leaves a file descriptor open."""
    before = open_fds()
    yield
    gc.collect()
    leaked = {fd: what for fd, what in open_fds().items() if before.get(fd) != what}
    assert not leaked
