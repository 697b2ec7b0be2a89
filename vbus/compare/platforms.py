"""The machines that layouts are laid out on: their holes, fixed functions, vectors.

`BARE` is the PC of the threads, nothing but the rules of PCI. `Q35` is what QEMU and
SeaBIOS make of it; its numbers were read off a guest (QEMU 11.1, -nodefaults).
"""

from dataclasses import dataclass

from vbus.compare.pci import BarShape, Function, Kind, Topology

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Platform:
    """What a layout can use. Sizes in bytes; ranges are (start, end)."""

    name: str
    about: str
    memory: tuple[int, int]
    high_memory: tuple[int, int]
    memory_window: int
    """The least size and alignment of a bridge's memory window."""
    memory_bar: int = 16
    """A smaller memory BAR is given so many bytes all the same."""
    legacy_ports: int = 0x1000
    short_ports: int = 0
    """Less than this is put at the end of the ports, not after the legacy ones."""
    spare_ports: int = 0
    """So many ports must be left over."""
    leftover_ports: bool = False
    """The guest's kernel gives ports that are left to bridges without any."""
    fixed: tuple[tuple[int, int, str, tuple[BarShape, ...]], ...] = ()
    cpus: int = 2

    def topology(self) -> Topology:
        """Give a tree with the fixed functions in it."""
        topology = Topology()
        for device, number, name, bars in self.fixed:
            topology.root.put(Function(name, bars), device, number)
        return topology


BARE = Platform(
    "bare",
    "the rules of PCI, no chipset: 64 KiB of ports less 4 KiB of legacy ones",
    memory=(0xC000_0000, 0xFEC0_0000),
    high_memory=(4 * _GIB, 36 * _GIB),
    memory_window=_MIB,
)

_AHCI = (BarShape(Kind.IO, 32), BarShape(Kind.MEMORY, 4096))
_SMBUS = (BarShape(Kind.IO, 64),)

Q35 = Platform(
    "q35",
    "QEMU's q35 with SeaBIOS: chipset functions, memory windows of at least 2 MiB",
    memory=(0xC000_0000, 0xFEC0_0000),
    high_memory=(4 * _GIB, 36 * _GIB),
    memory_window=2 * _MIB,
    memory_bar=4096,
    short_ports=0x4000,
    spare_ports=1,
    leftover_ports=True,
    fixed=(
        (0x00, 0, "host bridge", ()),
        (0x1F, 0, "LPC", ()),
        (0x1F, 2, "AHCI", _AHCI),
        (0x1F, 3, "SMBus", _SMBUS),
    ),
)

PLATFORMS = {platform.name: platform for platform in (Q35, BARE)}
