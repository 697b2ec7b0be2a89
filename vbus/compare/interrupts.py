"""Gives out interrupts: vectors of CPUs, routes of the host, shared lines.

A driver asks for its best number of vectors, takes fewer if there are not so many, and
shares a line in the end, as Linux's virtio does. So vectors never stop a layout: they
make devices share, and the number that share is part of the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vbus.compare.pci import Function
from vbus.compare.space import Space

# x86 Linux: vectors 0x21 to 0xeb, but the 16 of the legacy lines and the system call.
_FIRST, _END = 0x21, 0xEC
_RESERVED = ((0x30, 16), (0x80, 1))
# KVM's routing table; the lines of both PICs and of the IOAPIC are in it.
ROUTES = 4096
_LINE_ROUTES = 40


@dataclass(frozen=True, slots=True)
class Interrupts:
    """What the functions of a layout got."""

    vectors: int
    routes: int
    reduced: int
    """Functions with fewer vectors than their drivers like best."""
    sharing: int
    """Functions that share an interrupt line."""
    spaces: tuple[Space, ...] = field(compare=False)
    """The vectors of each CPU, for whoever checks them."""


def assign(functions: Iterable[Function], cpus: int) -> Interrupts:
    """Give each function its vectors, in order, on the CPU with most left."""
    spaces = [_cpu(number) for number in range(cpus)]
    routes = Space("interrupt routes", _LINE_ROUTES, ROUTES)
    reduced = sharing = 0
    for function in functions:
        if not function.vectors:
            continue
        got = next(
            (n for n in function.vectors if _take(function, n, spaces, routes)), 0
        )
        reduced += got != function.vectors[0]
        sharing += not got
    reserved = sum(size for _, size in _RESERVED)
    vectors = sum(space.used - reserved for space in spaces)
    return Interrupts(vectors, routes.used, reduced, sharing, tuple(spaces))


def _cpu(number: int) -> Space:
    space = Space(f"vectors of CPU {number}", _FIRST, _END)
    for start, size in _RESERVED:
        space.place(start, size, "reserved")
    return space


def _take(function: Function, count: int, spaces: list[Space], routes: Space) -> bool:
    """Take all of `count` vectors and routes, or nothing."""
    room = sum(space.end - space.start - space.used for space in spaces)
    if room < count or routes.end - routes.start - routes.used < count:
        return False
    for _ in range(count):
        least = min(spaces, key=lambda space: space.used)
        least.take(1, 1, function.name)
        routes.take(1, 1, function.name)
    return True
