"""Fixtures for tests in real virtual machines: one line boots one.

Without a QEMU and a guest image (no network, another architecture) the tests are
skipped with the reason; with VBUS_VM_REQUIRED set they fail. Console and daemon log
stay in the test's folder; the report of a test that fails tells where.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.system.served import Served
from vbus.errors import VbusError
from vbus.vm import image as images
from vbus.vm import qemu
from vbus.vm.image import GuestImage
from vbus.vm.machine import VirtualMachine
from vbus.vm.machine import boot as boot_machine

Boot = Callable[..., AbstractAsyncContextManager[VirtualMachine]]
Daemon = Callable[[str], Served]
T = TypeVar("T")

_KEPT = {"console", "qemu", "command", "log"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        kept = sorted(path for path in folder.rglob("*") if path.name in _KEPT)
        report.sections.append(("consoles and logs", "\n".join(map(str, kept))))
    return report  # type: ignore[no-any-return, return-value]


def needed(make: Callable[[], T]) -> T:
    try:
        return make()
    except (VbusError, OSError) as error:
        if os.environ.get("VBUS_VM_REQUIRED"):
            raise
        pytest.skip(f"no virtual machine here: {error}")


@pytest.fixture(scope="session")
def emulator() -> qemu.Qemu:
    """A QEMU that has the vfio-user client, fetched if there is none."""
    return needed(qemu.fetch)


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The guest with the working tree in it."""
    return needed(images.cached)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Start `vbus serve` with a configuration: `daemon(CONFIG).socket("vm1")`."""
    count = itertools.count()
    with ExitStack() as stack:

        def start(config: str) -> Served:
            folder = tmp_path / f"daemon{next(count)}"
            folder.mkdir()
            return stack.enter_context(Served(folder, config))

        yield start


@pytest.fixture
def boot(tmp_path: Path, image: GuestImage, emulator: qemu.Qemu) -> Boot:
    """Boot a machine: `async with boot(daemon.socket("vm1")) as vm:`."""
    count = itertools.count()

    def start(
        *sockets: Path, **options: Any
    ) -> AbstractAsyncContextManager[VirtualMachine]:
        log = tmp_path / f"vm{next(count)}"
        return boot_machine(image, sockets, log=log, emulator=emulator, **options)

    return start
