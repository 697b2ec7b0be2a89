"""A guest that sends frames to itself: `frames_worker SOCKET SOURCE SINK`.

Its two venets are on one switch, and there is no kernel between: what it costs is the
host's work and two copies of ours. For each line on standard input, a number of
milliseconds, it sends for so long and prints the thousands of frames a second that
arrived. Says "ready" first.
"""

import sys
import time

import trio

from bench.processes import report
from proxy.drivers.venet import VenetDriver
from proxy.guest import attach
from vbus.net import FrameBatch, GuestPump, Tap

_SIZE = 1514
_BATCH = 32


class Port(VenetDriver):
    """A venet whose frames are ours."""

    pump: GuestPump

    async def _up(self, pump: GuestPump, tap: Tap | None, started: object) -> None:
        self.pump = pump
        await self.device.call(0)  # LINKUP
        self.up.set()
        await trio.sleep_forever()

    async def start(self, nursery: trio.Nursery) -> None:
        self.up = trio.Event()
        nursery.start_soon(self.run, lambda _: None)
        await self.up.wait()


class Sink:
    """Takes what comes, and counts it."""

    def __init__(self, pump: GuestPump) -> None:
        self.frames = 0
        self._pump = pump

    async def run(self) -> None:
        batch = FrameBatch()
        while True:
            await self._pump.wait()
            self.frames += self._pump.receive(batch)
            self._pump.done()
            await trio.lowlevel.checkpoint()


async def push(source: Port, sink: Sink, milliseconds: int, batch: FrameBatch) -> float:
    """Send for so long; thousands a second that arrived."""
    begin, before = time.perf_counter_ns(), sink.frames
    while (now := time.perf_counter_ns()) - begin < milliseconds * 1_000_000:
        if not source.pump.send(batch, 0, len(batch)):
            await source.pump.room()
        await trio.lowlevel.checkpoint()
    return (sink.frames - before) / (now - begin) * 1e6


async def main(socket: str, source_name: str, sink_name: str) -> None:
    async with attach(socket) as bridge, trio.open_nursery() as nursery:
        options = {"frames": True}
        source = Port(await bridge.device(source_name), options)
        target = Port(await bridge.device(sink_name), options)
        await source.start(nursery)
        await target.start(nursery)
        sink = Sink(target.pump)
        nursery.start_soon(sink.run)
        frame = bytes(target.mac) + bytes(source.mac) + b"\x88\xb5"
        batch = FrameBatch()
        batch.load([(frame.ljust(_SIZE, b"."), 0, 0, 0, 0, 0)] * _BATCH)
        print("ready", flush=True)
        async with trio.lowlevel.FdStream(0) as told:
            async for line in told:
                report({"kpps": await push(source, sink, int(line), batch)})
                sys.stdout.flush()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
