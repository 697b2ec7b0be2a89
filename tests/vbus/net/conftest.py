"""One sanitized program for all tests of the plain C headers."""

from collections.abc import Iterator

import pytest

from tests.vbus.net.harness import Harness, build


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    running = Harness(build(tmp_path_factory.mktemp("net")))
    yield running
    running.close()
