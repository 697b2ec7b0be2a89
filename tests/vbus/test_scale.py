"""A thousand devices on one bus: fast, small, and still one function (R10)."""

import gc
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from vbus import Connection, Device, abi, attribute, call
from vbus.abi import EventId
from vbus.testing import RecordedBridge, now

COUNT = 1000


class Sample(Device):
    type = "virtual-ethernet"
    level = attribute(int, default=1, writable=True)
    label = attribute(str, default="x")

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data


@pytest.fixture
def recorded() -> Iterator[RecordedBridge]:
    with RecordedBridge({"sample": Sample}) as recorded:
        yield recorded


def add_all(recorded: RecordedBridge) -> None:
    for number in range(COUNT):
        recorded.add(f"sample{number}", "sample", label=f"number {number}")


def test_announced_within_a_second(recorded: RecordedBridge) -> None:
    """Added, announced by name and type, and taken by the guest."""
    now(recorded.peer.start(abi.CAP_NAMES))
    began = time.perf_counter()
    add_all(recorded)
    taken = 0
    while events := recorded.peer.take_events():
        taken += sum(event.eventid == EventId.DEVADD for event in events)
    assert time.perf_counter() - began < 1
    assert taken == COUNT
    recorded.check()


def test_replayed_with_one_interrupt(recorded: RecordedBridge) -> None:
    add_all(recorded)
    now(recorded.peer.start())
    assert len(recorded.peer.interrupts) == 1
    assert len(recorded.peer.take_events()) == COUNT


def test_each_opens_and_answers(recorded: RecordedBridge) -> None:
    add_all(recorded)
    now(recorded.peer.start())
    handles = [now(recorded.peer.open(devid)) for devid in range(COUNT)]
    assert len(set(handles)) == COUNT
    for handle in handles:
        assert now(recorded.peer.call(handle, 0, b"hello")) == (0, b"hello")


def test_an_idle_device_is_small(recorded: RecordedBridge) -> None:
    """At most 30 KiB each, its announcement included; R5: no signal path yet."""
    now(recorded.peer.start())
    gc.collect()
    tracemalloc.start()
    try:
        add_all(recorded)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / COUNT < 30 * 1024
    assert recorded.bridge.statistics().signals == 0
    assert recorded.bridge.io_eventfds(1, 100)[0].offset == abi.SIGNAL_EVENTQ
