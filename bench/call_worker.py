"""A guest that calls an echo device: `Worker("call_worker", SOCKET, NAME, MS)`."""

import sys
import time

import trio

from bench.processes import NEAR, pin, report
from proxy.guest import attach

_ECHO = 0
_WARM_UP = 200
_DATA = bytes(64)


async def call(socket: str, name: str, milliseconds: int) -> None:
    """Take the time of calls; nanoseconds."""
    took: list[int] = []
    until = 0
    async with attach(socket) as bridge:
        echo = await bridge.open(name)
        while not until or time.perf_counter_ns() < until:
            begin = time.perf_counter_ns()
            await echo.call(_ECHO, _DATA)
            took.append(time.perf_counter_ns() - begin)
            if len(took) == _WARM_UP and not until:
                took.clear()
                until = time.perf_counter_ns() + milliseconds * 1_000_000
        await echo.close()
    took.sort()
    report({"p50_ns": took[len(took) // 2], "p99_ns": took[len(took) * 99 // 100]})


if __name__ == "__main__":
    pin(NEAR)
    trio.run(call, sys.argv[1], sys.argv[2], int(sys.argv[3]))
