"""The sentences on record, each with its number worked out by the models here.

A claim that does not come out says so: `holds` is false and the note tells why.
"""

from collections.abc import Callable, Iterator

from vbus.compare import doorbells
from vbus.compare.costs import PUBLISHED
from vbus.compare.enumeration import enumerate_buses
from vbus.compare.layouts import LAYOUTS, lay_out
from vbus.compare.layouts.base import find_limit
from vbus.compare.pci import Function, Topology
from vbus.compare.platforms import BARE, Q35
from vbus.compare.registers import legacy_config
from vbus.compare.remap import VirtualBar, reached
from vbus.compare.result import Claim, modelled
from vbus.compare.segments import SegmentedSpace
from vbus.compare.space import ExhaustedError, Space

_KVM_2013 = "kvm list, February to April 2013"
_KVM_2020 = "kvm list, August 2020"
_VIRTIO_2012 = "virtualization list, September to October 2012"
_KVM_2011 = "kvm and linuxppc lists, August 2011"
_LKML_2009 = "LKML, August 2009"
HOLE_READS = 8193


def claims() -> list[Claim]:
    """Work out every sentence."""
    return [claim for make in _ALL for claim in make()]


def default_q35() -> Topology:
    """Give the functions of QEMU's q35 with nothing said: a display and a network card.

    Those, the host bridge and three functions in slot 1f are there when a Linux without
    firmware tables looks for them.
    """
    topology = Q35.topology()
    topology.root.put(Function("VGA"), 1)
    topology.root.put(Function("e1000e"), 2)
    return topology


def port_bars(region: int, size: int) -> int:
    """Take port BARs of one size out of a region until it is full."""
    space = Space("I/O ports", 0, region)
    for count in range(region):
        try:
            space.take(size, size, f"device {count}")
        except ExhaustedError:
            return count
    return region


def _ports() -> Iterator[Claim]:
    name = "virtio-transitional-ports"
    bare = find_limit(LAYOUTS[name], BARE).devices
    q35 = find_limit(LAYOUTS[name], Q35).devices
    yield Claim(
        "R31",
        "a port claims an I/O window of 4 KiB, so at most 15 hot-pluggable devices",
        _KVM_2013,
        "15",
        modelled(bare, "devices"),
        bare == 15,
        f"QEMU's q35 boots {q35}: its own functions' ports take of the 15th window",
    )


def _assigned() -> Iterator[Claim]:
    [doorbell] = [one for one in doorbells.DOORBELLS if one.name == "assigned-address"]
    count, _ = doorbells.limit(doorbell, BARE)
    yield Claim(
        "R32",
        "2 bytes per device: 4 KiB gives about 2,000 devices",
        _KVM_2013,
        "about 2,000",
        modelled(count, "devices"),
        1900 <= count <= 2100,
        "",
    )


def _flat() -> Iterator[Claim]:
    count = port_bars(16 << 10, 64)
    halved = port_bars(16 << 10, 32)
    doubled = port_bars(32 << 10, 64)
    yield Claim(
        "R31",
        "64-byte I/O BARs on a flat bus leave room for over 500 devices in 16 KiB",
        _KVM_2013,
        "over 500",
        modelled(count, "devices"),
        count > 500,
        f"{halved} if the BARs have 32 bytes, {doubled} if the region has 32 KiB",
    )


def _holes() -> Iterator[Claim]:
    reads = enumerate_buses(default_q35()).hole_reads
    yield Claim(
        "R40",
        "a direct-booted Linux guest on q35 made 8193 accesses to the PCI hole",
        _KVM_2020,
        str(HOLE_READS),
        modelled(reads, "reads"),
        reads == HOLE_READS,
        "the walk over the default q35: 255 unknown buses, bus 0's empty places",
    )
    for who, recorded in (("kernel", "0.008"), ("user", "0.049")):
        cost = PUBLISHED.entries[f"hole_{who}"].value
        assert cost is not None
        seconds = reads * cost / 1e6
        yield Claim(
            "R40",
            f"{HOLE_READS} hole reads take {recorded} s, answered by"
            f" {'the kernel' if who == 'kernel' else 'user space'}",
            _KVM_2020,
            recorded,
            modelled(seconds, "s"),
            f"{seconds:.3f}" == recorded,
            "",
        )


def _config() -> Iterator[Claim]:
    for msix, recorded in ((False, 20), (True, 24)):
        at = legacy_config(msix=msix)
        yield Claim(
            "R20",
            f"device config is at {recorded} {'with' if msix else 'without'} MSI-X",
            _VIRTIO_2012,
            str(recorded),
            modelled(at, "offset"),
            at == recorded,
            "",
        )


def _remapped() -> Iterator[Claim]:
    space = SegmentedSpace("MMIO", 0xC000_0000, 1 << 30)
    groups = [f"group {number}" for number in range(32)]
    bars = [
        VirtualBar(space, group, space.take(0x4000, group, group)) for group in groups
    ]
    bases = [space.start + number * space.segment for number in range(-1, 129)]
    asked, got = reached(bars, bases)
    yield Claim(
        "R53",
        "a guest cannot remap itself out of its bounds",
        _KVM_2011,
        "0",
        modelled(got, "addresses"),
        got == 0 < asked,
        f"32 groups' BARs written with 130 addresses each; {asked:,} of these would"
        " have been outside",
    )


def _constant() -> Iterator[Claim]:
    bridge = LAYOUTS["vbus-bridge"]
    one, many = (lay_out(bridge, count, Q35) for count in (1, 2000))
    same = (
        one.placement.bars == many.placement.bars and one.interrupts == many.interrupts
    )
    yield Claim(
        "R10",
        "N devices cost no extra BAR, window or vector: functions for 2,000 devices",
        _LKML_2009,
        "1",
        modelled(len(many.members), "functions"),
        same and len(many.members) == 1,
        "",
    )


_ALL: tuple[Callable[[], Iterator[Claim]], ...] = (
    _ports,
    _assigned,
    _flat,
    _holes,
    _config,
    _remapped,
    _constant,
)
