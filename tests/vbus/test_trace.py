"""The ring of calls and signals: bounded, counted, and only there when it is on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus import Connection, Device, call
from vbus.bridge import Bridge
from vbus.errors import InvalidError
from vbus.testing import RecordedBridge, now
from vbus.trace import Trace


class Calls(Device):
    type = "org.vbus.calls"

    @call(1)
    def one(self, connection: Connection, data: bytes) -> bytes:
        return data

    @call(2)
    def two(self, connection: Connection, data: bytes) -> bytes:
        raise InvalidError("no")


@given(st.integers(1, 8), st.integers(0, 30), st.integers(0, 30))
def test_a_reader_gets_the_rest_in_order_and_is_told_what_is_gone(
    size: int, first: int, second: int
) -> None:
    trace = Trace(size)
    for nth in range(first):
        trace.record("call", "g", "d", nth)
    position = trace.total
    for nth in range(second):
        trace.record("call", "g", "d", first + nth)
    numbers = [record.number for record in trace.since(position)]
    lost = trace.lost_since(position)
    assert lost == max(0, second - size)
    assert numbers == list(range(first + lost, first + second))


def test_what_a_guest_does_is_recorded_with_its_result() -> None:
    with RecordedBridge({"calls": Calls}) as recorded:
        trace = Trace(100)
        recorded.bridge._trace = trace
        recorded.add("d", "calls")
        now(recorded.peer.start())
        handle = now(recorded.peer.open(0))
        now(recorded.peer.call(handle, 1, b"12345"))
        with pytest.raises(OSError, match="Invalid"):
            now(recorded.peer.call(handle, 2, b""))
        now(recorded.peer.close_device(handle))
        records = list(trace.since(0))
    short = [(at.kind, at.device, at.number, at.size, at.result) for at in records]
    assert short == [
        ("open", "d", 1, 0, 0),
        ("call", "d", 1, 5, 0),
        ("call", "d", 2, 0, -InvalidError.errno),
        ("close", "d", 1, 0, None),
    ]
    assert {record.guest for record in records} == {"guest"}
    times = [record.time_ns for record in records]
    assert times == sorted(times)
    assert all(record.duration_ns > 0 for record in records[:3])


def test_off_it_records_nothing() -> None:
    with RecordedBridge({"calls": Calls}) as recorded:
        recorded.add("d", "calls")
        now(recorded.peer.start())
        now(recorded.peer.open(0))
        assert isinstance(recorded.bridge, Bridge)
        assert recorded.bridge._trace.total == 0
        assert recorded.bridge._trace.on is False
