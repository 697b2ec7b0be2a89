"""PCI as far as a layout is concerned: functions with BARs on buses behind bridges.

    bus 0 --- function            a BAR is a power of two, aligned to its size
          +-- bridge --- bus 1    32 devices of 8 functions each on a bus
                                  256 buses, numbered depth first

Addresses are not given out here (firmware.py does), nor is anything shown to a guest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from vbus.compare.space import ExhaustedError
from vbus.errors import InvalidError

BUSES, DEVICES, FUNCTIONS = 256, 32, 8
IO_WINDOW = 4 << 10
_LEAST = {"io": 4, "memory": 16, "prefetchable": 16}


class Kind(StrEnum):
    """Where a BAR or a bridge window lies."""

    IO = "io"
    MEMORY = "memory"
    PREFETCHABLE = "prefetchable"


@dataclass(frozen=True, slots=True)
class BarShape:
    """What a base address register asks for; `wide` is a 64-bit one."""

    kind: Kind
    size: int
    wide: bool = False

    def __post_init__(self) -> None:
        if self.size < _LEAST[self.kind] or self.size & (self.size - 1):
            raise InvalidError(f"no BAR of {self.kind} has {self.size:#x} bytes")


@dataclass(slots=True)
class Function:
    """One PCI function.

    `vectors` are the numbers of MSI-X vectors its driver tries, best first; a driver
    that gets none shares its interrupt line. `group` names what it is isolated with.
    """

    name: str
    bars: tuple[BarShape, ...] = ()
    vectors: tuple[int, ...] = ()
    group: str = ""
    address: tuple[int, int] = (0, 0)
    below: "Bus | None" = None


@dataclass(frozen=True, slots=True)
class Windows:
    """What a bridge forwards downstream, and how finely it can say so.

    `io` is the granularity of its port window, None for a bridge that watches
    configuration cycles and needs no windows at all. With `hot_plug` it gets memory
    windows even with nothing behind it, and ports as long as there are some left over.
    """

    io: int | None = IO_WINDOW
    hot_plug: bool = False


@dataclass(slots=True, eq=False)
class Bus:
    """A bus and what is in its slots; `number` is valid once the tree is numbered."""

    bridge: Function | None = None
    parent: "Bus | None" = None
    windows: Windows = field(default_factory=Windows)
    express: bool = False
    number: int = 0
    subordinate: int = 0
    slots: dict[tuple[int, int], Function] = field(default_factory=dict)

    def put(self, function: Function, device: int, number: int = 0) -> Function:
        """Put a function at its place. Raises InvalidError if there is none."""
        place = device, number
        if not (0 <= device < DEVICES and 0 <= number < FUNCTIONS):
            raise InvalidError(f"a bus has no place {device:02x}.{number}")
        if place in self.slots:
            raise InvalidError(f"{function.name}: {device:02x}.{number} is taken")
        self.slots[place] = function
        function.address = place
        return function

    def free_device(self, function: Function) -> int:
        """Give the first empty slot. Raises ExhaustedError."""
        taken = {device for device, _ in self.slots}
        for device in range(DEVICES):
            if device not in taken:
                return device
        raise ExhaustedError("slots", f"none of the 32 of a bus for {function.name}")

    def functions(self) -> Iterator[Function]:
        """Give its functions in the order of their addresses."""
        for place in sorted(self.slots):
            yield self.slots[place]


class Topology:
    """A tree of buses below the host."""

    def __init__(self) -> None:
        self.root = Bus()
        self.buses: list[Bus] = [self.root]

    def bridge(
        self, bus: Bus, function: Function, device: int, number: int = 0
    ) -> "Bus":
        """Put a bridge into a slot and give the bus behind it."""
        bus.put(function, device, number)
        function.below = Bus(bridge=function, parent=bus)
        self.buses.append(function.below)
        return function.below

    def number(self) -> None:
        """Number the buses depth first. Raises ExhaustedError beyond 256."""
        if len(self.buses) > BUSES:
            raise ExhaustedError("bus numbers", f"{len(self.buses)} buses, 256 numbers")
        ordered: list[Bus] = []
        self._visit(self.root, ordered)
        self.buses = ordered

    def functions(self) -> Iterator[tuple[Bus, Function]]:
        """Give every function with its bus, in the order of enumeration."""
        for bus in self.buses:
            for function in bus.functions():
                yield bus, function

    def _visit(self, bus: Bus, ordered: list[Bus]) -> None:
        bus.number = len(ordered)
        ordered.append(bus)
        for function in bus.functions():
            if function.below is not None:
                self._visit(function.below, ordered)
        bus.subordinate = len(ordered) - 1
