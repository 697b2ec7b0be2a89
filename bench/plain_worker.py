"""What the daemon does for one call of a device, in CPU time of this one thread.

The quickest of many short runs counts: it is the one that nothing else came into.
"""

import time
import timeit

import trio

from backends.echo import Echo
from bench.processes import report
from shm import AddressSpace
from vbus.bus import BusModel
from vbus.client import BusClient, ClientCounters
from vbus.connection import Connection
from vbus.events import Event
from vbus.tasks import BridgeTasks
from vbus.trace import Trace

_CALLS = 2000
_RUNS = 100
_DATA = bytes(64)


class _NoEvents:
    waiting = 0

    def post(self, *events: Event) -> None:
        pass

    def close(self, event: Event, cookie: int) -> None:
        pass


def call_us(nursery: trio.Nursery, trace: Trace) -> float:
    """Microseconds of a call of 64 bytes, which the device gives back."""
    model = BusModel({"echo": Echo})
    model.add_bus("bus0")
    model.add_device("echo0", "echo", {})
    interface = model.link("bus0", "echo0")
    opened: list[Connection] = []
    answers: list[bytes] = []
    client = BusClient(
        "g1",
        AddressSpace(),
        _NoEvents(),
        BridgeTasks(nursery),
        ClientCounters(),
        timeout_s=5,
        trace=trace,
    )
    client.open(interface, 1, opened.append)
    handle = opened[0].handle

    def call() -> None:
        client.call(handle, 0, _DATA, 0, answers.append)
        answers.clear()

    timer = time.thread_time
    return (
        min(timeit.repeat(call, timer=timer, repeat=_RUNS, number=_CALLS))
        / _CALLS
        * 1e6
    )


async def main() -> None:
    async with trio.open_nursery() as nursery:
        traced, plain = Trace(4096), Trace(0)
        report({"plain": call_us(nursery, plain), "traced": call_us(nursery, traced)})
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
