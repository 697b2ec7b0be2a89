"""One end of a virtqueue in a process of its own, for the stress test.

Usage: queue_end.py driver|device FEATURES SIZE CHAINS SEED MEMFD OWN_BELL PEER_BELL

A chain carries its number; the device writes it back, inverted, in any order of chains.
Ends work in batches of random sizes, ask for notifications or not at random, and sleep
on their doorbells. Work there, and no doorbell, is a lost notification.
"""

import os
import random
import select
import sys
from collections.abc import Callable

from backends.virtio.queue import Chain, RingAddresses, VirtQueue
from proxy.virtio.ring import DriverQueue, RingLayout
from shm import AddressSpace

MEMORY = 1 << 20
RING, TABLES, DATA = 0, 0x8000, 0x40000
SLOT, ENTRIES = 64, 3
PATIENCE_MS = 2000


class End:
    """Its doorbell, the peer's, and what is random."""

    def __init__(self, memfd: int, bell: int, peer: int, seed: int) -> None:
        self.space = AddressSpace()
        self.space.map(0, MEMORY, memfd)
        self.random = random.Random(seed)
        self.bell, self.peer = bell, peer
        self.poll = select.poll()
        self.poll.register(bell, select.POLLIN)
        self.sleeps = 0

    def some(self) -> int:
        return self.random.choice([1, 2, 7, 32, 64])

    def ring(self) -> None:
        os.eventfd_write(self.peer, 1)

    def sleep(self, ready: Callable[[], bool]) -> None:
        """Until the doorbell; exit if there is work and it does not come."""
        self.sleeps += 1
        while not self.poll.poll(PATIENCE_MS):
            # It may be on its way just now: look, then give it the same time again.
            if ready() and not self.poll.poll(PATIENCE_MS):
                sys.exit("lost notification")
        os.eventfd_read(self.bell)


def drive(end: End, queue: DriverQueue, chains: int) -> None:
    spare, sent, back = list(range(queue.size)), 0, 0
    while back < chains:
        batch = []
        for number in range(sent, min(sent + end.some(), chains, sent + len(spare))):
            at = DATA + SLOT * spare[len(batch)]
            end.space.write(at, number.to_bytes(8, "little"))
            cut = end.random.randrange(8) if queue.size > 2 else 0
            out = [(at, cut), (at + cut, 8 - cut)] if cut else [(at, 8)]
            batch.append((out, [(at + 32, 8)], (number, spare[len(batch)])))
        added = queue.add_batch(batch)
        del spare[:added]
        sent += added
        if queue.kick_needed():
            end.ring()
        done = queue.collect(end.some())
        for (number, slot), written in done:
            answer = int.from_bytes(
                end.space.read(DATA + SLOT * slot + 32, 8), "little"
            )
            if written != 8 or answer != number ^ (1 << 64) - 1:
                sys.exit(f"a wrong answer to {number}")
            spare.append(slot)
        back += len(done)
        if end.random.random() < 0.3:
            queue.disable_interrupts()
        if not added and not done and not queue.enable_interrupts():
            end.sleep(queue.enable_interrupts)


def serve(end: End, queue: VirtQueue, chains: int) -> None:
    out: list[Chain] = []
    done = 0
    while done < chains:
        taken = queue.pop_batch(end.some())
        for chain in taken:
            number = int.from_bytes(chain.read(), "little")
            chain.write(0, (number ^ (1 << 64) - 1).to_bytes(8, "little"))
        out += taken
        end.random.shuffle(out)
        n = end.random.randint(0, len(out)) if taken else len(out)
        queue.push_batch([(each, 8) for each in out[:n]])
        del out[:n]
        done += n
        if queue.should_notify():
            end.ring()
        if end.random.random() < 0.3:
            queue.disable_kicks()
        if not taken and not n and not queue.enable_kicks():
            end.sleep(queue.enable_kicks)


def main() -> None:
    side = sys.argv[1]
    features, size, chains, seed, memfd, bell, peer = map(int, sys.argv[2:])
    end = End(memfd, bell, peer, seed)
    layout = RingLayout.at(RING, size)
    if side == "driver":
        queue = DriverQueue(
            end.space, size, layout, features, tables=TABLES, entries=ENTRIES
        )
        print("ready", flush=True)  # the ring is laid
        drive(end, queue, chains)
    else:
        serve(end, VirtQueue(end.space, size, RingAddresses(*layout), features), chains)
    print(end.sleeps)


if __name__ == "__main__":
    main()
