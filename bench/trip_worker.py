"""Sends one message there and one back, under trio: `Worker("trip_worker", ROLE, ...)`.

MODE "sleeping": both ends go to sleep between messages. "awake": both spin first.
"""

import sys
import time
from array import array

import trio

from bench.processes import FAR, NEAR, pin, report
from bench.rings import RingEnd, RingFiles
from ioq import AdaptiveSpin, RingConsumer, RingProducer
from shm import Locality

_SIZE = 64
_WARM_UP = 200
_REQUESTS, _REPLIES = 0, 1


class Ends:
    """The two rings from one side: what it sends on and what it receives from."""

    def __init__(self, files: RingFiles, locality: Locality, mode: str) -> None:
        space = files.map()
        requests, replies = (RingEnd(files, space, n, locality) for n in (0, 1))
        out, into = requests, replies
        if locality is Locality.SOUTH:
            out, into = replies, requests
        else:
            replies.post_buffers(_SIZE)
        spins = [AdaptiveSpin() if mode == "awake" else None for _ in range(2)]
        north = locality is Locality.NORTH
        self._slots = (out.slots_at, _SIZE) if north else None
        self._repost = _SIZE if north else None
        self._producer = RingProducer(out.ring, out.bell, spins[0])
        self._consumer = RingConsumer(into.ring, into.bell, spins[1])
        self._payload = bytearray(_SIZE)
        self._sizes = array("I", [0])

    async def send(self) -> None:
        await self._producer.send(self._payload, _SIZE, slots=self._slots)

    async def receive(self) -> None:
        await self._consumer.receive(self._payload, self._sizes, repost=self._repost)


async def ask(ends: Ends, milliseconds: int) -> None:
    """Take the time of round trips; nanoseconds."""
    took: list[int] = []
    until = 0
    while not until or time.perf_counter_ns() < until:
        begin = time.perf_counter_ns()
        await ends.send()
        await ends.receive()
        took.append(time.perf_counter_ns() - begin)
        if len(took) == _WARM_UP and not until:
            took.clear()
            until = time.perf_counter_ns() + milliseconds * 1_000_000
    took.sort()
    report({"p50_ns": took[len(took) // 2], "p99_ns": took[len(took) * 99 // 100]})


async def answer(ends: Ends) -> None:
    """Send back whatever comes, until stopped."""
    while True:
        await ends.receive()
        await ends.send()


def main(role: str, mode: str, fds: str, slots: str, milliseconds: str) -> None:
    north = role == "north"
    pin(NEAR if north else FAR)
    files = RingFiles.parse(fds, slots)
    ends = Ends(files, Locality.NORTH if north else Locality.SOUTH, mode)
    if north:
        trio.run(ask, ends, int(milliseconds))
    else:
        trio.run(answer, ends)


if __name__ == "__main__":
    main(*sys.argv[1:])
