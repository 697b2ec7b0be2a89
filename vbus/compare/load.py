"""Interrupts as load rises: one simulated CPU, N devices, three ways to interrupt it.

`vector-each`  every device has a vector and polls until its queue is empty (NAPI);
               devices take turns.
`coalesced`    one event queue: no interrupt while the guest drains; first come first.
`prioritised`  the same with priorities: the most urgent first. So does the bridge,
               and so does a paravirtual interrupt controller beneath ordinary vectors.

Packets come at random (Poisson), from a seed, so a result can be had again. The times
of an event and of an interrupt are assumptions; their ratio is what matters.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import median

EVENT_US = 2.0
INTERRUPT_US = 4.0
BUDGET = 64
"""Packets that one device may have handled before the next one's turn."""
URGENT_SHARE = 0.01
SCHEMES = ("vector-each", "coalesced", "prioritised")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What so many packets took. Latencies are those of the urgent device, in us."""

    packets: int
    interrupts: int
    urgent_median_us: float
    urgent_high_us: float

    @property
    def per_thousand(self) -> float:
        """Interrupts per 1,000 packets."""
        return 1000 * self.interrupts / self.packets


@dataclass(frozen=True, slots=True)
class _Packet:
    at: float
    device: int


def simulate(
    scheme: str, devices: int, load: float, packets: int = 8000, seed: int = 1
) -> Outcome:
    """Run so many packets through; `load` 1 would keep the CPU busy with events."""
    guest = _GUESTS[scheme](devices)
    arrivals = deque(_arrivals(devices, load, packets, Random(seed)))
    now = 0.0
    waits = []
    while arrivals or guest.waiting:
        if not guest.waiting:
            now = max(now, arrivals[0].at)
        while arrivals and arrivals[0].at <= now:
            now += INTERRUPT_US * guest.arrive(arrivals.popleft())
        done = guest.handle()
        now += EVENT_US
        if done.device == 0:
            waits.append(now - done.at)
    waits.sort()
    high = waits[int(0.99 * (len(waits) - 1))] if waits else 0.0
    middle = median(waits) if waits else 0.0
    return Outcome(packets, guest.interrupts, middle, high)


def _arrivals(
    devices: int, load: float, packets: int, random: Random
) -> Iterator[_Packet]:
    """Give packets in order of time; device 0 is the urgent one, with few of them."""
    now = 0.0
    for _ in range(packets):
        now += random.expovariate(load / EVENT_US)
        urgent = devices == 1 or random.random() < URGENT_SHARE
        yield _Packet(now, 0 if urgent else random.randrange(1, devices))


class _VectorEach:
    """A queue a device, a list of those that are polled."""

    def __init__(self, devices: int) -> None:
        self.interrupts = 0
        self.waiting = 0
        self._queues: list[deque[_Packet]] = [deque() for _ in range(devices)]
        self._polled: deque[int] = deque()
        self._used = 0

    def arrive(self, packet: _Packet) -> bool:
        """Take a packet in; true if that interrupts."""
        queue = self._queues[packet.device]
        interrupts = not queue
        if interrupts:
            self._polled.append(packet.device)
            self.interrupts += 1
        queue.append(packet)
        self.waiting += 1
        return interrupts

    def handle(self) -> _Packet:
        """Handle one packet of the device whose turn it is."""
        device = self._polled[0]
        queue = self._queues[device]
        packet = queue.popleft()
        self.waiting -= 1
        self._used += 1
        if not queue or self._used == BUDGET:
            self._polled.popleft()
            self._used = 0
            if queue:
                self._polled.append(device)
        return packet


class _Coalesced:
    """One queue of events for all devices; `urgent` ones in front if there are any."""

    def __init__(self, devices: int, *, priorities: bool = False) -> None:
        self.interrupts = 0
        self.waiting = 0
        self._priorities = priorities
        self._urgent: deque[_Packet] = deque()
        self._queue: deque[_Packet] = deque()

    def arrive(self, packet: _Packet) -> bool:
        """Take a packet in; true if that interrupts."""
        interrupts = not self.waiting
        self.interrupts += interrupts
        urgent = self._priorities and packet.device == 0
        (self._urgent if urgent else self._queue).append(packet)
        self.waiting += 1
        return interrupts

    def handle(self) -> _Packet:
        """Handle the event that is first."""
        self.waiting -= 1
        return (self._urgent or self._queue).popleft()


class _Prioritised(_Coalesced):
    def __init__(self, devices: int) -> None:
        super().__init__(devices, priorities=True)


_GUESTS: dict[str, type[_VectorEach] | type[_Coalesced]] = {
    "vector-each": _VectorEach,
    "coalesced": _Coalesced,
    "prioritised": _Prioritised,
}
