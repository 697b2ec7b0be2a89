"""What a layout is: a plan of functions on buses, laid out on a machine."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from vbus.compare import firmware, interrupts
from vbus.compare.enumeration import Enumeration, enumerate_buses
from vbus.compare.firmware import Placement
from vbus.compare.interrupts import Interrupts
from vbus.compare.pci import Function, Kind, Topology
from vbus.compare.platforms import Platform
from vbus.compare.space import ExhaustedError

_SEARCH_END = 1 << 13


class Layout(ABC):
    """One way to show N devices to a guest."""

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    rows: ClassVar[str]
    """The requirement rows it answers."""
    doorbell: ClassVar[str]
    """The cost of one notification, a key of a cost model."""
    hot_plug: ClassVar[str]
    """What plugging a device into a running guest rests on."""

    @abstractmethod
    def plan(self, topology: Topology, devices: int) -> None:
        """Put the functions and bridges for so many devices into a machine."""

    def place(self, topology: Topology, platform: Platform) -> Placement:
        """Give out addresses. Raises ExhaustedError."""
        return firmware.place(topology, platform)


@dataclass(frozen=True, slots=True)
class Laid:
    """A layout with all its numbers given out."""

    layout: Layout
    devices: int
    topology: Topology
    placement: Placement
    interrupts: Interrupts
    enumeration: Enumeration

    @property
    def members(self) -> list[Function]:
        """The functions for the devices and the bridges to them, not the machine's."""
        return [one for _, one in self.topology.functions() if one.group]

    @property
    def groups(self) -> int:
        """How many things can be isolated from each other."""
        return len({one.group for one in self.members})

    def used(self, *, io: bool) -> int:
        """Bytes in BARs, ports or memory."""
        bars = [bar for one in self.members for bar in one.bars]
        return sum(bar.size for bar in bars if (bar.kind is Kind.IO) == io)

    def claimed(self, *, io: bool) -> int:
        """Bytes the root bus gave away for them, windows and segments included."""
        owners = {one.name for one in self.members} | {
            one.group for one in self.members
        }
        return sum(
            one.size
            for space in self.placement.spaces
            if (space.name == firmware.IO_PORTS) == io
            for one in space.taken
            if one.owner in owners
        )


def lay_out(layout: Layout, devices: int, platform: Platform) -> Laid:
    """Lay out so many devices. Raises ExhaustedError naming what ran out."""
    topology, placement = _placed(layout, devices, platform)
    functions = [function for _, function in topology.functions()]
    got = interrupts.assign(functions, platform.cpus)
    return Laid(layout, devices, topology, placement, got, enumerate_buses(topology))


def _placed(
    layout: Layout, devices: int, platform: Platform
) -> tuple[Topology, Placement]:
    """Give out what can run out: buses, slots, addresses. Raises ExhaustedError."""
    topology = platform.topology()
    layout.plan(topology, devices)
    topology.number()
    return topology, layout.place(topology, platform)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many devices fit, and what stops the next; `error` None if nothing does."""

    devices: int
    error: ExhaustedError | None


@cache
def find_limit(layout: Layout, platform: Platform) -> Limit:
    """Lay out more and more devices, up to 8,192, until something runs out.

    Remembered: reports, claims and maps ask for the same limits.
    """
    fits, stops = 0, None
    error = None
    step = 1
    while stops is None or stops - fits > 1:
        middle = min(step, _SEARCH_END) if stops is None else (fits + stops) // 2
        try:
            _placed(layout, middle, platform)
        except ExhaustedError as raised:
            stops, error = middle, raised.with_traceback(None)
        else:
            fits = middle
            if fits == _SEARCH_END:
                break
        step *= 2
    return Limit(fits, error)
