"""Fixtures of the guest's tests: a host with a guest's socket."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.proxy.host import Host, hosted


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with hosted(tmp_path) as host:
        yield host
