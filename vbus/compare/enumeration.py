"""Counts what it takes to find a layout: Linux's walk over configuration space.

Each known bus is asked for all its slots (one behind an express port), function 0
first, the other seven if it says that there are more. Then every other bus number is
asked for all 32 slots, for buses that no bridge leads to. An access that nothing
answers is a hole read; what answers is a function, which is then set up.
"""

from dataclasses import dataclass

from vbus.compare.pci import BUSES, DEVICES, FUNCTIONS, Bus, Topology

# Counted at our own server during one boot of QEMU 11.1 (SeaBIOS, Linux 6.12): 72 reads
# and 61 writes of a function with two BARs and one capability.
ACCESSES_PER_FUNCTION = 72 + 61


@dataclass(frozen=True, slots=True)
class Enumeration:
    """How many accesses found nothing, and how many of the layout's functions were set
    up; the machine's own are not counted."""

    hole_reads: int
    functions: int

    @property
    def accesses(self) -> int:
        """Configuration accesses that a device model answers."""
        return self.functions * ACCESSES_PER_FUNCTION


def enumerate_buses(topology: Topology) -> Enumeration:
    """Walk over the whole tree and over the bus numbers without a bus."""
    holes = sum(_holes(bus) for bus in topology.buses)
    holes += (BUSES - len(topology.buses)) * DEVICES
    return Enumeration(holes, sum(bool(one.group) for _, one in topology.functions()))


def _holes(bus: Bus) -> int:
    holes = 0
    for device in range(1 if bus.express else DEVICES):
        present = sum((device, number) in bus.slots for number in range(FUNCTIONS))
        if not present:
            holes += 1
        elif present > 1:
            holes += FUNCTIONS - present
    return holes
