"""Runs the models and puts what they say into one report."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from vbus.compare import doorbells, load
from vbus.compare.claims import claims
from vbus.compare.costs import check, enumeration_times
from vbus.compare.layouts import LAYOUTS, Laid, Layout, lay_out
from vbus.compare.layouts.base import find_limit
from vbus.compare.layouts.virtio import PAGES_PER_QUEUE, QUEUES
from vbus.compare.platforms import Platform
from vbus.compare.result import (
    VERSION,
    AddressMap,
    Costs,
    DoorbellResult,
    LayoutResult,
    LoadPoint,
    MapRange,
    MapSpace,
    PlatformResult,
    Point,
    Quantities,
    Report,
    Stop,
    modelled,
)
from vbus.compare.space import ExhaustedError, Range, Space

DEVICES = (1, 8, 32, 128, 512, 2000)
LOADS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MOST_DEVICES = 8192
ROUNDS = 5
LOAD_DEVICES = 32
MAP_DEVICES = 30
_PAGE = 4096
GUEST_MEMORY = 1 << 30
"""What is mapped for each isolation group if everything is mapped up front."""

Step = Callable[[str], None]


def model(
    platform: Platform,
    costs: Costs,
    devices: Sequence[int] = DEVICES,
    step: Step = lambda what: None,
) -> Report:
    """Lay out everything for every number of devices.

    `step` is called before each part with its name. Ctrl-C leaves out what is not done
    yet. Raises InvalidError if the cost model is incomplete.
    """
    check(costs)
    layouts: list[LayoutResult] = []
    loads: list[LoadPoint] = []
    interrupted = False
    try:
        for layout in LAYOUTS.values():
            step(layout.title)
            layouts.append(model_layout(layout, platform, costs, devices))
        for scheme in load.SCHEMES:
            step(f"interrupts, {scheme}")
            loads += model_load(scheme, LOADS)
    except KeyboardInterrupt:
        interrupted = True
    return Report(
        version=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        interrupted=interrupted,
        platform=PlatformResult(platform.name, platform.about, platform.cpus),
        costs=costs,
        claims=[] if interrupted else claims(),
        layouts=layouts,
        doorbells=[model_doorbell(one, platform, costs) for one in doorbells.DOORBELLS],
        loads=loads,
    )


STEPS = len(LAYOUTS) + len(load.SCHEMES)


def model_layout(
    layout: Layout, platform: Platform, costs: Costs, devices: Iterable[int]
) -> LayoutResult:
    """Lay out one layout for every number of devices, and find where it stops."""
    found = find_limit(layout, platform)
    limit = _stop(found.devices, found.error)
    mapped = min(MAP_DEVICES, limit.devices)
    return LayoutResult(
        name=layout.name,
        title=layout.title,
        about=layout.about,
        rows=layout.rows,
        hot_plug=layout.hot_plug,
        doorbell=layout.doorbell,
        limit=limit,
        points=[_point(layout, count, limit, platform, costs) for count in devices],
        map=_map(lay_out(layout, mapped, platform)),
    )


def model_load(scheme: str, loads: Iterable[float]) -> list[LoadPoint]:
    """Simulate one way to interrupt under rising load."""
    found = []
    for share in loads:
        outcome = load.simulate(scheme, LOAD_DEVICES, share)
        quantities = {
            "interrupts_per_1000": modelled(outcome.per_thousand, "interrupts"),
            "urgent_median": modelled(outcome.urgent_median_us, "us"),
            "urgent_high": modelled(outcome.urgent_high_us, "us"),
        }
        found.append(LoadPoint(scheme, LOAD_DEVICES, share, quantities))
    return found


def model_doorbell(
    doorbell: doorbells.Doorbell, platform: Platform, costs: Costs
) -> DoorbellResult:
    """Say what one kind of doorbell costs and how many there can be."""
    count, error = doorbells.limit(doorbell, platform)
    return DoorbellResult(
        name=doorbell.name,
        title=doorbell.title,
        rows=doorbell.rows,
        nested=doorbell.nested,
        assigned=doorbell.assigned,
        remark=doorbell.remark,
        limit=_stop(count, error),
        quantities={"cost": costs.entries[doorbell.cost]},
    )


def _stop(devices: int, error: ExhaustedError | None) -> Stop:
    if error is None:
        return Stop(devices, "", f"nothing ran out up to {devices:,} devices")
    return Stop(devices, error.resource, error.detail)


def _point(
    layout: Layout, count: int, limit: Stop, platform: Platform, costs: Costs
) -> Point:
    if count > limit.devices:
        return Point(count, f"{limit.resource} after {limit.devices:,} devices", {})
    return Point(count, None, _quantities(lay_out(layout, count, platform), costs))


def _quantities(laid: Laid, costs: Costs) -> Quantities:
    """Everything that is counted in a layout that fits."""
    found = laid.enumeration
    rings = laid.devices * QUEUES * PAGES_PER_QUEUE
    entries = {
        "functions": (len(laid.members), "functions"),
        "buses": (len(laid.topology.buses), "buses"),
        "vectors": (laid.interrupts.vectors, "vectors"),
        "routes": (laid.interrupts.routes, "routes"),
        "fewer_vectors": (laid.interrupts.reduced, "functions"),
        "shared_lines": (laid.interrupts.sharing, "functions"),
        "io_used": (laid.used(io=True), "bytes"),
        "io_claimed": (laid.claimed(io=True), "bytes"),
        "memory_used": (laid.used(io=False), "bytes"),
        "memory_claimed": (laid.claimed(io=False), "bytes"),
        "bridge_map_entries": (laid.placement.map_entries, "entries"),
        "isolation_groups": (laid.groups, "groups"),
        "pages_up_front": (laid.groups * (GUEST_MEMORY // _PAGE), "pages"),
        "pages_on_request": (rings, "pages"),
        "config_accesses": (found.accesses, "accesses"),
        "hole_reads": (found.hole_reads, "reads"),
    }
    quantities = {
        name: modelled(value, unit) for name, (value, unit) in entries.items()
    }
    times = enumeration_times(costs, found.hole_reads, found.accesses)
    doorbell = costs.entries[laid.layout.doorbell]
    return {**quantities, **times, "doorbell": doorbell}


def _map(laid: Laid) -> AddressMap:
    spaces = [
        _map_space(space, [bar.range for bar in laid.placement.bars])
        for space in laid.placement.spaces
    ]
    return AddressMap(laid.devices, [space for space in spaces if space.ranges])


def _map_space(space: Space, bars: Iterable[Range]) -> MapSpace:
    """Draw up a space of the root bus; what BARs fill is summed up by address."""
    inside = sorted(
        (bar.start, bar.size) for bar in bars if space.start <= bar.start < space.end
    )
    starts = [start for start, _ in inside]
    ranges = []
    for one in sorted(space.taken, key=lambda one: one.start):
        first, last = bisect_left(starts, one.start), bisect_left(starts, one.end)
        used = sum(size for _, size in inside[first:last])
        ranges.append(MapRange(one.start, one.size, used, one.owner))
    return MapSpace(space.name, space.start, space.end, ranges)
