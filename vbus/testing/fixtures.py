"""A pytest plugin: `pytest_plugins = ["vbus.testing.fixtures"]` in a conftest.py."""

from collections.abc import Callable, Iterator, Mapping

import pytest

from vbus.device import Device
from vbus.testing.bridge import RecordedBridge


@pytest.fixture
def recorded_bridge() -> Iterator[
    Callable[[Mapping[str, type[Device]]], RecordedBridge]
]:
    """A factory: `recorded_bridge({"echo": Echo})`; closed and checked afterwards."""
    made: list[RecordedBridge] = []

    def make(classes: Mapping[str, type[Device]]) -> RecordedBridge:
        made.append(RecordedBridge(classes))
        return made[-1]

    yield make
    for recorded in made:
        recorded.close()
