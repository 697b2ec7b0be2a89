"""Cost models: what one access costs. The published one is the default."""

from vbus.compare.result import Costs, Quantities, Quantity, missing, modelled
from vbus.errors import InvalidError

# Every cost model has all of these, or says why it has not.
TITLES = {
    "pio_exit": "port write, exit to user space (outw)",
    "mmio_exit": "MMIO write, exit to user space (movw)",
    "hypercall": "hypercall (vmcall)",
    "pv_mmio": "paravirtual memory access (pv)",
    "pio_ioeventfd": "port write, ioeventfd in the kernel",
    "mmio_ioeventfd": "MMIO write, ioeventfd in the kernel",
    "hole_kernel": "read of a PCI hole, answered by the kernel",
    "hole_user": "read of a PCI hole, answered by user space",
    "hole_mapped": "read of a PCI hole, mapped page of 0xff",
}

_NOT_PUBLISHED = "not in the published table"

PUBLISHED = Costs(
    name="published",
    source=(
        "cycles: kvm list, February to April 2013, virtio-pci without I/O BARs;"
        " hole reads: kvm list, August 2020, KVM_MEM_PCI_HOLE memory"
    ),
    entries={
        "pio_exit": modelled(1737, "cycles"),
        "mmio_exit": modelled(4341, "cycles"),
        "hypercall": modelled(1566, "cycles"),
        "pv_mmio": modelled(1817, "cycles"),
        "pio_ioeventfd": missing("cycles", _NOT_PUBLISHED),
        "mmio_ioeventfd": missing("cycles", _NOT_PUBLISHED),
        "hole_kernel": modelled(1.0, "us"),
        "hole_user": modelled(6.0, "us"),
        "hole_mapped": modelled(0.0, "us"),
    },
)

HOLES = ("hole_kernel", "hole_user", "hole_mapped")


def check(costs: Costs) -> Costs:
    """Give it back. Raises InvalidError if an entry is missing or in a wrong unit."""
    lacking = [name for name in TITLES if name not in costs.entries]
    if lacking:
        raise InvalidError(f"the cost model has no {', '.join(lacking)}")
    for name in HOLES:
        if costs.entries[name].unit != "us":
            raise InvalidError(f"{name} is in {costs.entries[name].unit}, not us")
    return costs


def enumeration_times(costs: Costs, hole_reads: int, accesses: int) -> Quantities:
    """Give the time of an enumeration in us, by who answers the reads of holes.

    What is not a hole is answered by user space, whoever answers the holes.
    """
    access = costs.entries["hole_user"]
    return {
        f"enumeration_{name}": _time(costs.entries[name], access, hole_reads, accesses)
        for name in HOLES
    }


def _time(hole: Quantity, access: Quantity, reads: int, accesses: int) -> Quantity:
    for one in (hole, access):
        if one.value is None:
            return missing("us", one.missing or "no cost")
    assert hole.value is not None
    assert access.value is not None
    return modelled(reads * hole.value + accesses * access.value, "us")
