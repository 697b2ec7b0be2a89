"""Pushes messages one way: `Worker("ring_worker", "north"|"south", MODE, ...)`.

North produces and south consumes. Each message is copied out of a private buffer and
into another. A message of one byte says that it was the last.
"""

import os
import select
import sys
import time
from array import array
from collections.abc import Callable

import trio

from bench.processes import FAR, NEAR, pin, report
from bench.rings import BATCH, RingEnd, RingFiles
from ioq import AdaptiveSpin, RingConsumer, RingProducer
from shm import Locality


def wait_blocking(end: RingEnd, ready: Callable[[], bool]) -> None:
    """Sleep in select(2) until it is our turn: the waiting side of ABI 5.3."""
    signal = end.ring.signal
    while True:
        signal.wakeup_begin()
        if ready():
            return
        if not signal.wakeup_end():
            select.select([end.bell], [], [])
            end.bell.drain()


def produce_blocking(end: RingEnd, payload: bytes, size: int, until_ns: int) -> int:
    """Send batches, one at least, until it is time; the number of messages."""
    ring, sent = end.ring, 0
    slots = (end.slots_at, size)
    while True:
        taken = ring.produce(payload, size, slots)
        if taken:
            sent += taken
            ring.signal.inject()
        else:
            wait_blocking(end, ring.room)
        if time.perf_counter_ns() >= until_ns:
            return sent


def consume_blocking(end: RingEnd, size: int) -> int:
    """Take messages up to the last; their number."""
    ring, taken = end.ring, 0
    payload, sizes = bytearray(size * BATCH), array("I", bytes(4 * BATCH))
    while True:
        got = ring.consume(payload, sizes, BATCH)
        if not got:
            wait_blocking(end, ring.owned)
            continue
        ring.signal.inject()
        taken += got
        if sizes[got - 1] == 1:
            return taken


async def produce_trio(end: RingEnd, payload: bytes, size: int, until_ns: int) -> int:
    """As `produce_blocking`, with the product's own producer."""
    producer, sent = RingProducer(end.ring, end.bell, AdaptiveSpin()), 0
    while True:
        await producer.send(payload, size, slots=(end.slots_at, size))
        sent += BATCH
        if time.perf_counter_ns() >= until_ns:
            return sent


async def consume_trio(end: RingEnd, size: int) -> int:
    """As `consume_blocking`, with the product's own consumer."""
    consumer = RingConsumer(end.ring, end.bell, AdaptiveSpin())
    payload, sizes, taken = bytearray(size * BATCH), array("I", bytes(4 * BATCH)), 0
    while True:
        got = await consumer.receive(payload, sizes)
        taken += got
        if sizes[got - 1] == 1:
            return taken


async def run_north(end: RingEnd, mode: str, size: int, milliseconds: int) -> None:
    """Warm up for a fifth of the time, measure, send the last message."""
    payload = os.urandom(size * BATCH)  # takes longer than a short measurement

    async def produce(for_ms: float) -> int:
        until = time.perf_counter_ns() + int(for_ms * 1e6)
        if mode == "trio":
            return await produce_trio(end, payload, size, until)
        return produce_blocking(end, payload, size, until)

    warm_up = await produce(milliseconds / 5)
    begin = time.perf_counter_ns()
    sent = await produce(milliseconds)
    rate = sent / (time.perf_counter_ns() - begin) * 1e9
    last = (end.slots_at, size)
    if mode == "blocking":
        while not end.ring.produce(b"!", 1, last):
            wait_blocking(end, end.ring.room)
        end.ring.signal.inject()
    else:
        await RingProducer(end.ring, end.bell).send(b"!", 1, slots=last)
    report({"rate": rate, "messages": warm_up + sent + 1})


async def run_south(end: RingEnd, mode: str, size: int) -> None:
    """Count what arrives."""
    if mode == "trio":
        report({"messages": await consume_trio(end, size)})
    else:
        report({"messages": consume_blocking(end, size)})


def main(role: str, mode: str, fds: str, slots: str, size: str, ms: str) -> None:
    north = role == "north"
    pin(NEAR if north else FAR)
    files = RingFiles.parse(fds, slots)
    end = RingEnd(files, files.map(), 0, Locality.NORTH if north else Locality.SOUTH)
    if mode == "blocking":
        end.ring.signal.enable()
    if north:
        trio.run(run_north, end, mode, int(size), int(ms))
    else:
        trio.run(run_south, end, mode, int(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
