"""How numbers are written, in every report: with their unit and where they come from.

`~` stands before what was modelled, `=` before what was measured; a measured number is
a median and has its range and count behind it.
"""

from vbus.compare.result import Costs, Quantity

LEGEND = "~ modelled   = measured: median (lowest to highest, rounds)   - none"

METRICS = {
    "functions": "functions",
    "buses": "bus numbers",
    "vectors": "interrupt vectors",
    "shared_lines": "functions that got no vector",
    "io_claimed": "I/O ports claimed",
    "memory_claimed": "address space claimed",
    "enumeration_hole_user": "enumeration, holes answered by user space",
    "enumeration_hole_kernel": "enumeration, holes answered by the kernel",
    "enumeration_hole_mapped": "enumeration, holes mapped",
    "isolation_groups": "isolation groups",
    "pages_up_front": "pages mapped, all memory up front for each group",
    "pages_on_request": "pages mapped, rings on request",
}
"""What the tables show, in this order; JSON and CSV have everything."""

SCHEMES = {
    "vector-each": "a vector each",
    "coalesced": "coalesced (root device)",
    "prioritised": "prioritised (bridge)",
}
LOAD_METRICS = {
    "interrupts_per_1000": "interrupts per 1,000 packets",
    "urgent_high": "urgent event, 99th percentile of its latency",
}

MEASURES = {
    "functions": "functions",
    "vectors": "interrupt vectors of the guest",
    "shared_lines": "functions without a vector",
    "config_accesses": "configuration accesses until all is known",
    "region_accesses": "region accesses until all is known",
    "boot": "boot of a machine",
    "bring_up": "boot until all devices have drivers",
    "attach": "time to attach and know all devices",
    "open_call_close": "open, call and close, a device",
    "call": "call",
    "round_trip": "round trip of a small message or frame",
    "tcp_out": "bulk TCP from the guest",
    "tcp_in": "bulk TCP to the guest",
    "hot_add": "hot add to usable",
    "hot_remove": "hot remove to gone",
    "memory_idle": "daemon's memory a device, idle",
    "memory_open": "daemon's memory a device, open",
    "fds_idle": "daemon's descriptors a device, idle",
    "fds_open": "daemon's descriptors a device, open",
    "qemu_fds": "QEMU's descriptors, all",
    "urgent_flat": "urgent round trip in a flood, no priority",
    "urgent_flat_high": "the same, 99th percentile",
    "urgent_first": "urgent round trip in a flood, highest priority",
    "urgent_first_high": "the same, 99th percentile",
}
"""What is measured on a guest, in this order."""

WAYS = {"vbus-bridge": "one bridge", "function-each": "a function each"}
GUESTS = {
    "process": "processes with echo devices",
    "machine": "virtual machines with virtio devices",
}
"""The kinds of guest that are measured; see docs/compare.md."""


def amount(value: float, unit: str) -> str:
    """Write a number for people, in the unit that suits it."""
    if unit == "bytes":
        for bound, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
            if value >= bound:
                return f"{_digits(value / bound)} {name}"
        return f"{value:,.0f} B"
    if unit == "us":
        for bound, name in ((1_000_000, "s"), (1_000, "ms")):
            if value >= bound:
                return f"{_digits(value / bound)} {name}"
        return f"{_digits(value)} us"
    if unit == "bit/s":
        giga = value >= 1e9
        return f"{_digits(value / (1e9 if giga else 1e6))} {'G' if giga else 'M'}bit/s"
    return _digits(value)


def _digits(value: float) -> str:
    """Three digits that count; whole numbers whole, and two digits of small ones."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}"


def quantity(one: Quantity | None) -> str:
    """Write a number with its mark; both, where it was modelled and measured."""
    if one is None or one.missing is not None:
        return "-"
    words = []
    if one.modelled is not None:
        words.append(f"~{amount(one.modelled, one.unit)}")
    if one.measured is not None:
        sample = one.measured
        low, high = (amount(value, one.unit) for value in (sample.low, sample.high))
        words.append(
            f"={amount(sample.median, one.unit)} ({low} to {high}, {sample.count})"
        )
    return " ".join(words)


def cost(one: Quantity) -> str:
    """Write a cost with its unit, or why there is none."""
    if one.missing is not None:
        return f"- {one.missing}"
    unit = f" {one.unit}" if one.unit != "us" else ""
    return quantity(one) + unit


def source(costs: Costs) -> str:
    """Say whose costs these are."""
    return f"cost model '{costs.name}': {costs.source}"
