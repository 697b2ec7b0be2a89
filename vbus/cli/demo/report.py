"""What the demo says at its end: counters added up, the PCI footprint, a table."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

# One modern virtio-net function with one queue pair, as QEMU shows it by default: the
# MSI-X table in BAR1, all else in BAR4; vectors for receive, transmit, configuration.
VIRTIO_BARS = 2
VIRTIO_VECTORS = 3


def counters(counted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up what the guests counted."""
    bridges = [one["bridge"] for one in counted]
    interrupts = sum(sum(one["interrupts"]["by_vector"]) for one in bridges)
    frames = sum(
        frames["tx_frames"] + frames["rx_frames"] for frames in _frames(counted)
    )
    return {
        "frames": frames,
        "events": sum(sum(one["events"].values()) for one in bridges),
        "interrupts": interrupts,
        "frames_per_interrupt": round(frames / interrupts, 1) if interrupts else None,
        "calls": sum(one["calls"]["fast_calls"] for one in bridges),
    }


def _frames(counted: Iterable[dict[str, Any]]) -> Iterable[dict[str, int]]:
    for one in counted:
        for device in one["devices"].values():
            if device["driver"] and "frames" in device["driver"]:
                yield device["driver"]["frames"]


def generated(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], took: float
) -> dict[str, Any]:
    """Round trip and throughput of generated frames between the guests."""

    def exchange(counted: dict[str, Any]) -> dict[str, Any]:
        return next(
            device["driver"]["exchange"]
            for device in counted["devices"].values()
            if device["driver"] and device["driver"].get("exchange")
        )

    received = sum(
        exchange(last)["received_bytes"] - exchange(first)["received_bytes"]
        for first, last in zip(before, after, strict=True)
    )
    return {
        "ping_rtt_us": {"g1-g2": exchange(after[0])["rtt_us"]},
        "tcp_gbit_s": None,
        "generated_gbit_s": received * 8 / took / 1e9,
    }


def footprint(ours: dict[str, int], devices: int) -> dict[str, Any]:
    """What this bus takes on PCI, beside one virtio-pci function per device."""
    return {
        "devices": devices,
        "vbus": ours,
        "virtio_pci": {
            "functions": devices,
            "bars": devices * VIRTIO_BARS,
            "vectors": devices * VIRTIO_VECTORS,
        },
    }


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Print it all."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from vbus.cli.asking import print_table

    print_table(("what", "where", "measured"), _rows(result), "vbus demo")
    pci = result["pci"]
    print_table(
        (f"PCI footprint, {pci['devices']} devices", "functions", "BARs", "vectors"),
        [
            ("vbus, for any number of devices", *_numbers(pci["vbus"])),
            ("virtio-pci, one function a device", *_numbers(pci["virtio_pci"])),
        ],
    )
    print(
        f"vbus: counted at the function that guest {_names(result)[0]} is attached to."
        " virtio-pci: by"
        f" model, {VIRTIO_BARS} BARs and {VIRTIO_VECTORS} vectors each."
    )


def _numbers(footprint: dict[str, int]) -> tuple[int, int, int]:
    return footprint["functions"], footprint["bars"], footprint["vectors"]


def _names(result: dict[str, Any]) -> tuple[str, str]:
    """Who was plugged to, and who was killed."""
    return ("vm1", "vm2") if "guests" in result else ("g1", "g2")


def _guests(result: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """How each guest came up, of a demo with virtual machines."""
    for name, guest in result.get("guests", {}).items():
        kind = "process"
        if guest["boot_s"] is not None:
            kind = f"machine under {result['accelerator']}, {guest['function']}"
            yield "boot", name, f"{guest['boot_s']:.1f} s"
        yield "guest run", name, f"running after {guest['running_s']:.1f} s: {kind}"


def _rows(result: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    yield from _guests(result)
    plugged, killed = _names(result)
    for pair, trip in result["ping_rtt_us"].items():
        yield "round trip", pair, f"{trip:.0f} us"
    for pair, rate in (result["tcp_gbit_s"] or {}).items():
        yield "TCP", pair, f"{rate:.2f} Gbit/s"
    if "generated_gbit_s" in result:
        yield "generated frames", "g1, g2", f"{result['generated_gbit_s']:.2f} Gbit/s"
    plug = result["hot_plug_ms"]
    yield "hot add", plugged, f"running after {plug['add_to_running']:.0f} ms"
    yield "hot drop", plugged, f"gone after {plug['remove_to_gone']:.0f} ms"
    if "killed" in result:
        held, freed = result["killed"]["held_before"], result["killed"]["freed_ms"]
        mapped = f"{held['mapped_bytes'] >> 20} MiB in {held['regions']} regions"
        yield "kill -9 of its QEMU", killed, f"{mapped} freed after {freed:.0f} ms"
    for pair, sums in result.get("checksums", {}).items():
        whole = f"{sums['bytes'] >> 20} MiB, CRC-32 {sums['crc32']} at both ends"
        yield "TCP arrived whole", pair, whole
    yield "kill -9, new guest", killed, f"answers after {result['reattach_ms']:.0f} ms"
    yield "frames", "all guests", str(result["frames"])
    yield "bus events", "", str(result["events"])
    yield "interrupts", "", str(result["interrupts"])
    yield "frames per interrupt", "", str(result["frames_per_interrupt"])
    yield "calls", "", str(result["calls"])
