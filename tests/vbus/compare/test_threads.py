"""What the threads said, each sentence with its number, worked out by the models."""

import pytest

from vbus.compare import doorbells
from vbus.compare.claims import claims, default_q35, port_bars
from vbus.compare.costs import PUBLISHED, enumeration_times
from vbus.compare.enumeration import ACCESSES_PER_FUNCTION, enumerate_buses
from vbus.compare.layouts import LAYOUTS, lay_out
from vbus.compare.layouts.base import find_limit
from vbus.compare.pci import Topology
from vbus.compare.platforms import BARE, Q35
from vbus.compare.registers import (
    FOUR_BAR_COMMON,
    LEGACY,
    MIRRORED,
    MSIX_FIELDS,
    legacy_config,
    mirrored_bar,
    offset,
)

DOORBELLS = {one.name: one for one in doorbells.DOORBELLS}


def test_15_hot_pluggable_devices_with_io_windows() -> None:
    """R31: "a bridge claims a 4 KiB-aligned I/O window of the 64 KiB, so at most 15
    such devices with I/O BARs"."""
    limit = find_limit(LAYOUTS["virtio-transitional-ports"], BARE)
    assert limit.devices == 15
    assert limit.error is not None
    assert limit.error.resource == "I/O ports"
    laid = lay_out(LAYOUTS["virtio-transitional-ports"], 15, BARE)
    windows = [w for w in laid.placement.windows if w.kind == "io"]
    assert len(windows) == 15
    assert {(w.range.size, w.range.start % 4096) for w in windows} == {(4096, 0)}


def test_2000_devices_with_assigned_addresses() -> None:
    """R32: "hypervisor-assigned I/O address, 2 bytes per device, 4 KiB gives about
    2000 devices"."""
    count, error = doorbells.limit(DOORBELLS["assigned-address"], BARE)
    assert count == 4096 // 2 == 2048
    assert error is not None
    assert error.resource == "assigned I/O addresses"


def test_over_500_devices_in_16_kib_needs_32_byte_bars() -> None:
    """R31: "64-byte I/O BARs on a flat bus leave room for over 500 devices in 16 KiB".

    By allocation that holds 256. 32-byte BARs, which virtio-net's legacy registers fit
    in, make it 512, and so do 64-byte ones in 32 KiB.
    """
    assert port_bars(16 << 10, 64) == 256
    assert port_bars(16 << 10, 32) == 512 > 500
    assert port_bars(32 << 10, 64) == 512 > 500
    [claim] = [one for one in claims() if "over 500" in one.sentence]
    assert not claim.holds
    assert claim.note


def test_8193_accesses_to_the_hole() -> None:
    """R40: "a direct-booted Linux guest on q35 made 8193 accesses to the PCI hole"."""
    assert enumerate_buses(default_q35()).hole_reads == 8193


@pytest.mark.parametrize(
    ("who", "seconds"),
    [("hole_kernel", 0.008), ("hole_user", 0.049), ("hole_mapped", 0.0)],
)
def test_times_of_8193_hole_reads(who: str, seconds: float) -> None:
    """R40: "about 1 us each when the kernel answers, about 6 us when user space does,
    nothing when a single page of 0xff is mapped": 0.008 s and 0.049 s."""
    times = enumeration_times(PUBLISHED, 8193, 0)
    value = times[f"enumeration_{who}"].value
    assert value is not None
    assert round(value / 1e6, 3) == seconds


def test_device_config_at_20_and_24() -> None:
    """R20: "device config at 20, or at 24 when MSI-X is enabled"."""
    assert legacy_config(msix=False) == 20
    assert legacy_config(msix=True) == 24


def test_the_legacy_registers_are_where_they_were() -> None:
    """R20: their offsets, from the sizes in the row."""
    places = {name: offset(LEGACY, name) for name, _ in LEGACY}
    assert places == {
        "host_features": 0,
        "guest_features": 4,
        "queue_pfn": 8,
        "queue_size": 12,
        "queue_select": 14,
        "queue_notify": 16,
        "status": 18,
        "isr": 19,
    }
    inserted = (*LEGACY, *MSIX_FIELDS)
    assert offset(inserted, "msi_config_vector") == 20
    assert offset(inserted, "msi_queue_vector") == 22


def test_the_four_bar_proposals_common_registers() -> None:
    """R21: the order and sizes of the later draft, so a 64-bit address at 32."""
    assert offset(FOUR_BAR_COMMON, "config_gen_and_latch") == 16
    assert offset(FOUR_BAR_COMMON, "queue_address") == 32
    assert offset(FOUR_BAR_COMMON, "") == 40


def test_the_mirrored_proposal_appends_three_registers() -> None:
    """R22: legacy at 0 to 19, vectors at 20 to 23 always, then three of 32 bits; config
    overlaid on them fits in the same BAR as long as it is short."""
    assert offset(MIRRORED, "msi_config_vector") == 20
    assert offset(MIRRORED, "host_feature_select") == 24
    assert offset(MIRRORED, "queue_pfn_hi") == 32
    assert offset(MIRRORED, "") == 36
    assert mirrored_bar(8) == 64
    assert mirrored_bar(60) == 128


def test_cycles_on_record() -> None:
    """R30: "outw 1737, movw (MMIO) 4341, vmcall 1566, pv memory access 1817"."""
    costs = {name: one.modelled for name, one in PUBLISHED.entries.items()}
    assert costs["pio_exit"] == 1737
    assert costs["mmio_exit"] == 4341
    assert costs["hypercall"] == 1566
    assert costs["pv_mmio"] == 1817
    assert "2013" in PUBLISHED.source
    assert "2020" in PUBLISHED.source


def test_the_order_of_doorbells_on_record() -> None:
    """R32: a hypercall is "faster than PIO"; paravirtual MMIO "a little slower"."""
    cost = {
        name: PUBLISHED.entries[one.cost].modelled or 0
        for name, one in DOORBELLS.items()
    }
    assert cost["hypercall"] < cost["pio-exit"] < cost["pv-mmio"] < cost["mmio-exit"]
    assert cost["pv-mmio"] < 1.1 * cost["pio-exit"]


def test_pros_and_cons_on_record() -> None:
    """R32: which doorbells work nested and assigned."""
    assert not DOORBELLS["hypercall"].nested
    assert not DOORBELLS["hypercall"].assigned
    assert DOORBELLS["pv-mmio"].nested
    assert DOORBELLS["pv-mmio"].assigned
    assert not DOORBELLS["assigned-address"].nested


@pytest.mark.parametrize("devices", [1, 8, 32, 128, 512, 2000])
def test_one_functions_worth_of_enumeration(devices: int) -> None:
    """R41: "one function's worth of enumeration for any N"."""
    laid = lay_out(LAYOUTS["vbus-bridge"], devices, Q35)
    assert laid.enumeration.functions == 1
    assert laid.enumeration.accesses == ACCESSES_PER_FUNCTION


def test_an_empty_machine_is_all_holes() -> None:
    """R40: 256 buses of 32 slots, nobody there."""
    assert enumerate_buses(Topology()).hole_reads == 256 * 32


def test_every_other_claim_holds() -> None:
    """All sentences but that of 16 KiB come out as they were said."""
    failing = [one.sentence for one in claims() if not one.holds]
    assert len(failing) == 1
    assert {one.row for one in claims()} == {"R31", "R32", "R40", "R20", "R10", "R53"}
