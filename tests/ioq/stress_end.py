"""One end of a ring in a process of its own, for the stress test.

Usage: stress_end.py north|south send|receive MESSAGES SEED MEMFD OWN_BELL PEER_BELL

Messages are running numbers. The end works in batches of random sizes, masks and
unmasks its signal at random, and sleeps in either way the signal protocol knows. Before
it sleeps on it looks at the ring: work there, and no doorbell, is a lost wake-up.
"""

import os
import random
import select
import sys
from array import array
from collections.abc import Callable

from ioq import Index, Ring, ring_size
from shm import AddressSpace, Locality

COUNT = 128
MEMORY = 1 << 20
BUFFERS = 0x40000
SLOT = 64
PATIENCE_MS = 2000


class End:
    """A ring, its doorbell, and the two ways to wait."""

    def __init__(self, me: Locality, memfd: int, bell: int, peer: int, seed: int):
        self.space = AddressSpace()
        self.space.map(0, MEMORY, memfd)
        view = self.space.view(0, ring_size(COUNT))
        self.ring = Ring(view, self.space, me, lambda: os.eventfd_write(peer, 1))
        self.bell = bell
        self.poll = select.poll()
        self.poll.register(bell, select.POLLIN)
        self.random = random.Random(seed)
        self.sleeps = 0

    def sleep(self, ready: Callable[[], bool]) -> None:
        """Until the doorbell; exit if there is work and it does not come."""
        self.sleeps += 1
        while not self.poll.poll(PATIENCE_MS):
            # It may be on its way just now: look, then give it the same time again.
            if ready() and not self.poll.poll(PATIENCE_MS):
                sys.exit(f"lost wake-up: {self.ring.statistics()}")
        os.eventfd_read(self.bell)

    def wait_polling(self, end: int, ready: Callable[[], bool]) -> None:
        """As `ioq.aio` does it: masked while awake, armed before sleeping."""
        self.ring.disable()
        while not ready():
            if self.random.random() < 0.3 and self.ring._spin(end, 5_000):
                break
            if not self.ring._arm(end):
                self.sleep(ready)
            self.ring.disable()

    def wait_handler(self, ready: Callable[[], bool]) -> None:
        """As ABI 5.3 does it: enabled, a wakeup runs until nothing is dirty."""
        signal = self.ring.signal
        again = signal.enable()
        while True:
            if not again:
                self.sleep(ready)
            signal.wakeup_begin()
            if ready():
                return  # handled below, the wakeup ends with the next wait
            again = signal.wakeup_end()

    def wait(self, end: int, ready: Callable[[], bool]) -> None:
        if ready():
            self.fidget()
            return
        if self.random.random() < 0.5:
            self.wait_polling(end, ready)
        else:
            self.wait_handler(ready)

    def fidget(self) -> None:
        """Mask and unmask for no reason."""
        what = self.random.random()
        if what < 0.1:
            self.ring.signal.enable()
        elif what < 0.2:
            self.ring.disable()

    def batch(self, left: int) -> int:
        return min(left, self.random.choice([1, 2, 7, 32, 64, 128, 200]))


def send(end: End, messages: int, slots: tuple[int, int] | None) -> None:
    done = 0
    while done < messages:
        end.wait(1, end.ring.room)
        n = end.batch(messages - done)
        payload = array("Q", range(done, done + n))
        done += end.ring.produce(payload, 8, slots)
        end.ring.signal.inject()


def receive(end: End, messages: int, repost: int | None) -> None:
    done = 0
    into, sizes = bytearray(8 * 256), array("I", [0] * 256)
    eights = array("I", [8] * 256)
    while done < messages:
        end.wait(0, end.ring.owned)
        n = end.ring.consume(into, sizes, end.batch(messages - done), repost)
        end.ring.signal.inject()
        expected = array("Q", range(done, done + n)).tobytes()
        if into[: 8 * n] != expected or sizes[:n] != eights[:n]:
            sys.exit(f"messages lost or reordered after {done}")
        done += n


def main() -> None:
    side, what = sys.argv[1:3]
    messages, seed, memfd, bell, peer = map(int, sys.argv[3:])
    me = Locality[side.upper()]
    end = End(me, memfd, bell, peer, seed)
    north = me == Locality.NORTH
    if what == "send":
        send(end, messages, (BUFFERS, SLOT) if north else None)
    else:
        if north:
            buffers = [(i, BUFFERS + SLOT * i, SLOT) for i in range(COUNT)]
            assert end.ring.push(buffers, Index.VALID) == COUNT
            end.ring.signal.inject()
        receive(end, messages, SLOT if north else None)
    print(end.sleeps)


if __name__ == "__main__":
    main()
