"""Fixtures for every test, and which of them one worker runs in a row."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

MACHINES = Path(__file__).with_name("vm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a module's tests together, and virtual machines out of each other's way."""
    for item in items:
        apart = item.path if MACHINES not in item.path.parents else MACHINES
        item.add_marker(pytest.mark.xdist_group(str(apart)))


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
