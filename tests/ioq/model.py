"""A slow, plain ring: ABI section 6 as sentences, over a bytearray. The oracle.

It has no other side and no atomics: both localities act on the same bytes in turn.
"""

import struct
from typing import NamedTuple

HEAD = struct.Struct("<II16sIIB3xIIB3xI4x")
DESCRIPTOR = struct.Struct("<QQQBB6x")
MAGIC, VERSION = 0x47FA2FE4, 4
SIGNAL = struct.pack("<II8x", 0x58FA39DF, 1)
VALID, INUSE = 0, 1
HEADS, TAILS, FULLS = (24, 36), (28, 40), (32, 44)
NORTH, SOUTH = 0, 1


class Descriptor(NamedTuple):
    """The fields of a descriptor; `sown` is its owner."""

    cookie: int = 0
    ptr: int = 0
    len: int = 0
    valid: int = 0
    sown: int = NORTH


class Refused(Exception):
    """What the ABI answers with -EINVAL."""


class Model:
    """The memory of a ring, and the operations of 6.3 on it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.memory = bytearray(56 + 32 * count)
        HEAD.pack_into(self.memory, 0, MAGIC, VERSION, SIGNAL, 0, 0, 0, 0, 0, 0, count)

    def descriptor(self, at: int) -> Descriptor:
        """Descriptor number `at`."""
        return Descriptor(*DESCRIPTOR.unpack_from(self.memory, 56 + 32 * at))

    def put(self, at: int, descriptor: Descriptor) -> None:
        """Write all of it."""
        DESCRIPTOR.pack_into(self.memory, 56 + 32 * at, *descriptor)

    def inc(self, at: int) -> int:
        """6.2."""
        return 0 if at == self.count - 1 else at + 1

    def word(self, at: int) -> int:
        """A 32-bit value of the head."""
        return int.from_bytes(self.memory[at : at + 4], "little")

    def set_word(self, at: int, value: int) -> None:
        """The same, written."""
        self.memory[at : at + 4] = value.to_bytes(4, "little")

    def head(self, index: int) -> int:
        """Where the next pop is."""
        return self.word(HEADS[index])

    def tail(self, index: int) -> int:
        """Where the next push is."""
        return self.word(TAILS[index])

    def entries(self, index: int) -> int:
        """6.2."""
        head, tail = self.head(index), self.tail(index)
        if self.memory[FULLS[index]] and head == tail:
            return self.count
        return tail - head if tail >= head else tail + self.count - head

    def _move_tail(self, index: int) -> None:
        newtail = self.inc(self.tail(index))
        if newtail == self.head(index):
            self.memory[FULLS[index]] = 1
        self.set_word(TAILS[index], newtail)

    def push(self, me: int, index: int, at: int, *, both: bool, flip: bool) -> None:
        """6.3, push at position `at`."""
        descriptor = self.descriptor(at)
        if at != self.tail(index) or descriptor.sown != me:
            raise Refused
        self._move_tail(index)
        if both:
            self._move_tail(INUSE)
            assert self.tail(VALID) == self.tail(INUSE)
        if flip:
            self.put(at, descriptor._replace(sown=1 - me))

    def pop(self, me: int, index: int, at: int, *, flip: bool) -> None:
        """6.3, pop at position `at`."""
        descriptor = self.descriptor(at)
        if at != self.head(index) or descriptor.sown != me:
            raise Refused
        self.set_word(HEADS[index], self.inc(at))
        self.memory[FULLS[index]] = 0
        if flip:
            self.put(at, descriptor._replace(sown=1 - me))
