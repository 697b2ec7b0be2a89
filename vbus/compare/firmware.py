"""Gives out addresses as a PC's firmware does: sizes from below, places from above.

1. From the highest bus number down, what is behind a bridge is summed up, largest
   alignment first, and rounded up to the granularity of the window it needs.
2. Ports: the root bus takes one run of them. Memory below 4 GiB: both kinds end at the
   top of the hole, the more finely aligned one above the other.
3. Only if that does not fit, what can lie above 4 GiB moves there.
4. The guest's kernel gives what ports are left to hot-plug bridges that have none,
   lowest ports first: from the first bridge to the last if there is enough for all,
   else from the last to the first, while there are any.

The order and the roundings are those of SeaBIOS and Linux, as seen in guests.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from vbus.compare.pci import Bus, Function, Kind, Topology
from vbus.compare.platforms import Platform
from vbus.compare.space import ExhaustedError, Range, Space, align_down, align_up


@dataclass(slots=True)
class _Entry:
    """A BAR, or the window of the bridge to `bus`; a small BAR may be given more.

    A window that nothing needs has no size, but what it is put among is aligned to it.
    """

    owner: str
    kind: Kind
    asked: int
    size: int
    alignment: int
    wide: bool
    bus: Bus | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """A BAR that has its address."""

    function: str
    kind: Kind
    range: Range


@dataclass(frozen=True, slots=True)
class Window:
    """What one bridge forwards; `inside` lists what was placed in it."""

    bridge: str
    kind: Kind
    range: Range
    inside: tuple[Range, ...]


@dataclass(slots=True)
class Placement:
    """Where everything lies. `spaces` are those of the root bus, in address order."""

    spaces: tuple[Space, ...]
    bars: list[Bar] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    map_entries: int = 0
    """Entries that bridges without windows need to know what is behind them."""


RESERVED = "reserved"
IO_PORTS = "I/O ports"
LOW_MEMORY = "memory below 4 GiB"
HIGH_MEMORY = "memory above 4 GiB"

_Pools = dict[Bus, dict[Kind, list[_Entry]]]


def place(topology: Topology, platform: Platform) -> Placement:
    """Give every BAR and window its address. Raises ExhaustedError."""
    ports = Space(IO_PORTS, 0, 1 << 16)
    ports.place(0, platform.legacy_ports, RESERVED)
    low = Space(LOW_MEMORY, *platform.memory)
    high = Space(HIGH_MEMORY, *platform.high_memory)
    placement = Placement((ports, low, high))
    pools = _pools(topology, platform, placement)
    root = pools[topology.root]
    lay = _Layer(pools, placement)
    io = root[Kind.IO]
    lay.root(io, ports, _io_base(io, platform))
    memory = _memory_bases(root, platform)
    if memory is None:
        wide = _take_wide(root)
        memory = _memory_bases(root, platform)
        if memory is None:
            needed = sum(e.size for kind in _MEMORY for e in root[kind])
            raise ExhaustedError(LOW_MEMORY, f"{needed:#x} bytes are asked for")
        lay.root(wide, high, align_up(high.start, _alignment(wide)))
    for kind in _MEMORY:
        lay.root(root[kind], low, memory[kind])
    if platform.leftover_ports:
        _give_leftovers(topology, ports, placement)
    return placement


_MEMORY = (Kind.MEMORY, Kind.PREFETCHABLE)


def _give_leftovers(topology: Topology, ports: Space, placement: Placement) -> None:
    served = {one.bridge for one in placement.windows if one.kind is Kind.IO}
    wanting = [
        (bus.bridge.name, bus.windows.io)
        for bus in topology.buses
        if bus.bridge is not None
        and bus.windows.hot_plug
        and bus.windows.io is not None
        and bus.bridge.name not in served
    ]
    try:
        list(_leftovers(wanting, ports.copy()))
    except ExhaustedError:
        wanting.reverse()
    with suppress(ExhaustedError):
        for bridge, window in _leftovers(wanting, ports):
            placement.windows.append(Window(bridge, Kind.IO, window, ()))


def _leftovers(
    wanting: Iterable[tuple[str, int]], ports: Space
) -> Iterator[tuple[str, Range]]:
    for bridge, size in wanting:
        yield bridge, ports.take(size, size, bridge)


def _pools(topology: Topology, platform: Platform, placement: Placement) -> _Pools:
    """Collect what each bus has to hold, windows of the buses behind it included."""
    pools: _Pools = {bus: {kind: [] for kind in Kind} for bus in topology.buses}
    for bus, function in topology.functions():
        at = bus
        while at.windows.io is None and at.parent is not None:
            placement.map_entries += len(function.bars)
            at = at.parent
        for entry in _bar_entries(function, platform):
            pools[at][entry.kind].append(entry)
    for bus in reversed(topology.buses[1:]):
        for kind in Kind:
            window = _window(bus, kind, pools[bus][kind], platform)
            if window is not None:
                assert bus.parent is not None
                pools[bus.parent][kind].append(window)
    for kinds in pools.values():
        for entries in kinds.values():
            entries.sort(key=lambda entry: (-entry.alignment, -entry.size))
    return pools


def _bar_entries(function: Function, platform: Platform) -> Iterator[_Entry]:
    for bar in function.bars:
        least = 0 if bar.kind is Kind.IO else platform.memory_bar
        size = max(bar.size, least)
        yield _Entry(function.name, bar.kind, bar.size, size, size, bar.wide)


def _window(
    bus: Bus, kind: Kind, inside: list[_Entry], platform: Platform
) -> _Entry | None:
    if bus.windows.io is None:
        return None
    least = bus.windows.io if kind is Kind.IO else platform.memory_window
    alignment = max([least, *(entry.alignment for entry in inside)])
    size = align_up(_sum(inside), alignment)
    if not size and bus.windows.hot_plug and kind is not Kind.IO:
        size = alignment
    if not size and kind is Kind.IO:
        return None
    assert bus.bridge is not None
    wide = kind is Kind.PREFETCHABLE and all(entry.wide for entry in inside)
    wide = wide and (bool(inside) or not size)
    return _Entry(bus.bridge.name, kind, size, size, alignment, wide, bus)


def _sum(entries: Iterable[_Entry]) -> int:
    return sum(entry.size for entry in entries)


def _alignment(entries: Iterable[_Entry]) -> int:
    return max((entry.alignment for entry in entries), default=1)


def _io_base(entries: list[_Entry], platform: Platform) -> int:
    """Where the run of ports begins: high up while it is short."""
    needed = _sum(entries)
    room = (1 << 16) - platform.legacy_ports
    if needed < platform.short_ports:
        return (1 << 16) - platform.short_ports
    if needed > room - platform.spare_ports:
        raise ExhaustedError(
            IO_PORTS, f"{needed:#x} are asked for, {room:#x} can be given out"
        )
    return platform.legacy_ports


def _memory_bases(
    pool: dict[Kind, list[_Entry]], platform: Platform
) -> dict[Kind, int] | None:
    """Where both kinds of memory begin below 4 GiB, or None if they do not fit."""
    start, end = platform.memory
    upper, lower = Kind.PREFETCHABLE, Kind.MEMORY
    if _alignment(pool[lower]) < _alignment(pool[upper]):
        upper, lower = lower, upper
    bases = {}
    for kind in (upper, lower):
        end = align_down(end - _sum(pool[kind]), _alignment(pool[kind]))
        bases[kind] = end
    return bases if end >= start else None


def _take_wide(pool: dict[Kind, list[_Entry]]) -> list[_Entry]:
    """Take out of a pool what can lie anywhere."""
    wide = []
    for kind in _MEMORY:
        wide += [entry for entry in pool[kind] if entry.wide]
        pool[kind] = [entry for entry in pool[kind] if not entry.wide]
    return sorted(wide, key=lambda entry: (-entry.alignment, -entry.size))


@dataclass(slots=True)
class _Layer:
    pools: _Pools
    placement: Placement

    def root(self, entries: list[_Entry], space: Space, base: int) -> None:
        """Give addresses from `base` on, out of a space of the root bus."""
        for entry in entries:
            base = self._put(entry, space, base)

    def _put(self, entry: _Entry, space: Space, base: int) -> int:
        if not entry.size:
            return base
        taken = space.place(base, entry.size, entry.owner)
        if taken.start % entry.alignment:
            raise ExhaustedError(space.name, f"{entry.owner} is not aligned")
        if entry.bus is None:
            bar = Range(taken.start, entry.asked, entry.owner)
            self.placement.bars.append(Bar(entry.owner, entry.kind, bar))
        else:
            self._fill(entry, entry.bus, taken)
        return taken.end

    def _fill(self, entry: _Entry, bus: Bus, window: Range) -> None:
        inside = Space(f"the window of {entry.owner}", window.start, window.end)
        self.root(self.pools[bus][entry.kind], inside, window.start)
        self.placement.windows.append(
            Window(entry.owner, entry.kind, window, inside.taken)
        )
