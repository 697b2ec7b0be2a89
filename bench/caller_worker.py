"""A guest that calls an echo device when told to: `caller_worker SOCKET NAME`.

For each line on standard input, a number of milliseconds, it calls for so long and
prints what that took. Says "ready" first.
"""

import sys
import time

import trio

from bench.processes import report
from proxy.device import DeviceProxy
from proxy.guest import attach

_ECHO = 0
_DATA = bytes(64)


async def calls(device: DeviceProxy, milliseconds: int) -> dict[str, float]:
    """Call one after the other; microseconds."""
    took: list[int] = []
    until = time.perf_counter_ns() + milliseconds * 1_000_000
    while (begin := time.perf_counter_ns()) < until:
        await device.call(_ECHO, _DATA)
        took.append(time.perf_counter_ns() - begin)
    took.sort()
    return {"p50": took[len(took) // 2] / 1000, "p99": took[-len(took) // 100] / 1000}


async def main(socket: str, name: str) -> None:
    async with attach(socket) as bridge, trio.lowlevel.FdStream(0) as told:
        echo = await bridge.open(name)
        print("ready", flush=True)
        async for line in told:
            report(await calls(echo, int(line)))
            sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2])
