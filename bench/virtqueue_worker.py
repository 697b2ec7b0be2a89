"""The device's end of a virtqueue, timed: chains taken and given back, in batches.

Usage: virtqueue_worker FEATURES WHAT MILLISECONDS; WHAT is bare, or copy (each chain's
bytes go into one buffer). Only the device's calls are timed, not the driver that feeds
it; both ends are in this process, so nobody sleeps.
"""

import sys
import time
from array import array

from backends.virtio.queue import RingAddresses, VirtQueue
from bench.processes import NEAR, pin, report
from bench.virtqueue import BATCH, SEGMENT
from proxy.virtio.ring import DriverQueue, RingLayout
from shm import AddressSpace, create_memfd

_SIZE = 256
_MEMORY = 16 << 20
_BUFFERS = 1 << 20


def main() -> None:
    """Measure and print chains a second."""
    features, what, limit_ms = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pin(NEAR)
    memory = create_memfd("bench", _MEMORY)
    spaces = AddressSpace(), AddressSpace()
    for space in spaces:
        space.map(0, _MEMORY, memory)
    layout = RingLayout.at(0, _SIZE)
    driver = DriverQueue(spaces[0], _SIZE, layout, features)
    device = VirtQueue(spaces[1], _SIZE, RingAddresses(*layout), features)
    chains: list[tuple[list[tuple[int, int]], list[tuple[int, int]], int]] = [
        ([(_BUFFERS + SEGMENT * n, SEGMENT)], [], n) for n in range(BATCH)
    ]
    buffer, sizes = bytearray(BATCH * SEGMENT), array("I", bytes(4 * BATCH))
    copy, spent, done = what == "copy", 0, 0
    clock = time.perf_counter_ns
    while spent < limit_ms * 1_000_000:
        driver.add_batch(chains)
        begin = clock()
        taken = device.pop_batch(BATCH)
        if copy:
            device.gather(taken, buffer, sizes)
        device.push_batch([(chain, 0) for chain in taken])
        device.should_notify()
        spent += clock() - begin
        done += len(taken)
        if len(driver.collect(BATCH)) != BATCH:
            raise RuntimeError("chains were lost")
    report({"rate": done / spent * 1e9})


if __name__ == "__main__":
    main()
