"""IOQ: rings of descriptors in shared memory, and batches of messages over them."""

from ioq.aio import AdaptiveSpin, RingConsumer, RingProducer, WaitStatistics, Wakeable
from ioq.errors import RingFault
from ioq.ring import LIMIT, Index, Iterator, Ring, RingStatistics, ring_size

__all__ = [
    "LIMIT",
    "AdaptiveSpin",
    "Index",
    "Iterator",
    "Ring",
    "RingConsumer",
    "RingFault",
    "RingProducer",
    "RingStatistics",
    "WaitStatistics",
    "Wakeable",
    "ring_size",
]
