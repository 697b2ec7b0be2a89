"""Draws the plots of a report as SVG that follows the page's light or dark colours.

Needs matplotlib (the extra `compare`). Each colour is drawn as a stand-in and then
replaced by a CSS variable, and text stays text, so one drawing suits both themes.
"""

import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vbus.compare import words
from vbus.compare.result import (
    LayoutResult,
    MapSpace,
    Measured,
    Quantities,
    Quantity,
    Report,
)
from vbus.errors import NoDeviceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The layouts whose lines are drawn; the proposals cost what transitional costs.
DRAWN = (
    "vbus-bridge",
    "root-virtio",
    "virtio-modern",
    "virtio-transitional",
    "virtio-modern-ports",
    "virtio-transitional-ports",
    "segmented",
)
MEASURED_PLOTS = (
    *("attach", "bring_up", "config_accesses", "vectors"),
    *("hot_add", "memory_open", "fds_open", "tcp_out"),
)
COST_PLOTS = ("functions", "vectors", "memory_claimed", "enumeration_hole_user")

INK, GRID, FAINT = "#010101", "#020202", "#030303"
SERIES = ("#110101", "#120202", "#130303", "#140404", "#150505", "#160606", "#170707")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {INK: "--ink", GRID: "--grid", FAINT: "--faint"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}


def need_library() -> None:
    """Raise NoDeviceError with the command to run if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NoDeviceError(
            "--html needs matplotlib: run `pip install 'vbus[compare]'`"
        ) from None


def cost(report: Report, name: str) -> str:
    """Draw one number against the number of devices, a line for each layout.

    A cross ends the line of a layout that stops before the last number of devices.
    """

    def draw(axes: "Axes") -> None:
        unit = ""
        for number, layout in enumerate(_drawn(report)):
            points = [
                (at.devices, value, at.quantities[name].unit)
                for at in layout.points
                if (value := _value(at.quantities, name)) is not None
            ]
            if not points:
                continue
            unit = points[0][2]
            counts, values = [p[0] for p in points], [p[1] for p in points]
            colour, marker = SERIES[number], MARKERS[number]
            axes.plot(counts, values, color=colour, marker=marker, markersize=4)
            if len(points) < len(layout.points):
                axes.plot(
                    counts[-1], values[-1], "x", color=colour, markersize=11, zorder=3
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        counts = [at.devices for at in report.layouts[0].points]
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xticks([], minor=True)
        _ticks(axes, unit)
        axes.set_xlabel("devices")

    return _svg(f"cost-{name}", 4.3, 3.1, draw)


def load(report: Report, name: str) -> str:
    """Draw one number against load, a line for each way to interrupt."""

    def draw(axes: "Axes") -> None:
        unit = ""
        for number, scheme in enumerate(words.SCHEMES):
            points = [
                (100 * at.load, value, at.quantities[name].unit)
                for at in report.loads
                if at.scheme == scheme
                and (value := _value(at.quantities, name)) is not None
            ]
            if points:
                unit = points[0][2]
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                colour, marker = SERIES[number], MARKERS[number]
                axes.plot(xs, ys, color=colour, marker=marker, markersize=4)
        axes.set_xlabel("load, % of a CPU")
        axes.set_xlim(0, 100)
        if unit == "us":
            axes.set_yscale("log")
            _ticks(axes, unit)
        else:
            axes.set_ylim(bottom=0)

    return _svg(f"load-{name}", 4.3, 3.1, draw)


def measured(guest: str, found: Measured, name: str) -> str:
    """Draw one measured number against devices, a line for each way with its range."""

    def draw(axes: "Axes") -> None:
        counts = sorted({at.devices for at in found.points})
        for number, way in enumerate(words.WAYS):
            points = [at for at in found.points if at.layout == way]
            _ranges(axes, number, name, [(at.devices, at.quantities) for at in points])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xticks([], minor=True)
        _ticks(axes, _unit(at.quantities.get(name) for at in found.points))
        axes.set_xlabel("devices")

    return _svg(f"measured-{guest}-{name}", 4.3, 3.1, draw)


def measured_load(guest: str, found: Measured, name: str) -> str:
    """Draw one measured number against messages under way, a line for each way."""

    def draw(axes: "Axes") -> None:
        steps = sorted({at.in_flight for at in found.loads})
        for number, way in enumerate(words.WAYS):
            loads = [at for at in found.loads if at.layout == way]
            _ranges(axes, number, name, [(at.in_flight, at.quantities) for at in loads])
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("messages under way")

    return _svg(f"measured-load-{guest}-{name}", 4.3, 3.1, draw)


def _ranges(
    axes: "Axes", number: int, name: str, points: Iterable[tuple[int, Quantities]]
) -> None:
    """Draw medians as a line, and from lowest to highest as a band."""
    found = [(at, one[name]) for at, one in points if name in one]
    samples = [(at, one.measured) for at, one in found if one.measured]
    xs = [at for at, _ in samples]
    colour = SERIES[number]
    axes.fill_between(
        xs,
        [sample.low for _, sample in samples],
        [sample.high for _, sample in samples],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    medians = [sample.median for _, sample in samples]
    axes.plot(xs, medians, color=colour, marker=MARKERS[number], markersize=4)


def _unit(found: Iterable[Quantity | None]) -> str:
    return next((one.unit for one in found if one is not None), "")


def address_map(report: Report, space: str, *, narrow: bool) -> str:
    """Draw a space of every layout to scale: claimed faintly, BARs on top."""
    found = [(one, _space(one, space)) for one in report.layouts]
    shown = [(one, at) for one, at in found if at is not None]
    width, row = (4.3, 0.46) if narrow else (11.0, 0.34)

    def draw(axes: "Axes") -> None:
        for number, (_, at) in enumerate(shown):
            _draw_space(axes, at, number)
        start, end = _bounds(at for _, at in shown)
        axes.set_xlim(start, end)
        axes.set_ylim(len(shown) - 0.5, -0.5 - (0.6 if narrow else 0))
        ticks = [start + (end - start) * part // 4 for part in range(5)]
        axes.set_xticks(ticks, [f"{at:x}" for at in ticks])
        names = [f"{one.name}, {one.map.devices}" for one, _ in shown]
        if narrow:
            axes.set_yticks([])
            for number, name in enumerate(names):
                axes.text(start, number - 0.42, name, color=INK, va="bottom", size=8)
        else:
            axes.set_yticks(range(len(shown)), names)
        axes.grid(False, axis="y")

    height = row * len(shown) + 0.6
    form = "narrow" if narrow else "wide"
    return _svg(f"map-{space}-{form}", width, height, draw)


def _draw_space(axes: "Axes", space: MapSpace, row: int) -> None:
    """A bar for each range, as wide as its addresses; what BARs fill of it on top."""
    reserved = [(one.start, one.size) for one in space.ranges if not one.used]
    claimed = [(one.start, one.size) for one in space.ranges if one.used]
    filled = [(one.start, one.used) for one in space.ranges if one.used]
    height = 0.5
    bottom = row - 0.25
    outline = [(space.start, space.end - space.start)]
    axes.broken_barh(outline, (bottom, height), facecolor="none", edgecolor=GRID)
    axes.broken_barh(reserved, (bottom, height), facecolor=FAINT, linewidth=0)
    axes.broken_barh(
        claimed, (bottom, height), facecolor=SERIES[3], alpha=0.45, linewidth=0
    )
    axes.broken_barh(
        filled,
        (bottom, height),
        facecolor=SERIES[0],
        edgecolor=SERIES[0],
        linewidth=0.6,
    )


def _drawn(report: Report) -> list[LayoutResult]:
    """Give the layouts with lines, in the order of their colours."""
    found = {layout.name: layout for layout in report.layouts}
    return [found[name] for name in DRAWN if name in found]


def _value(quantities: Quantities, name: str) -> float | None:
    one = quantities.get(name)
    return None if one is None else one.value


def _space(layout: LayoutResult, name: str) -> MapSpace | None:
    return next((one for one in layout.map.spaces if one.name == name), None)


def _bounds(spaces: Iterable[MapSpace]) -> tuple[int, int]:
    found = list(spaces)
    return min(one.start for one in found), max(one.end for one in found)


def _ticks(axes: "Axes", unit: str) -> None:
    """Label a logarithmic axis in the words of the tables."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if unit == "bytes":
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
    elif high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: words.amount(value, unit))
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(name: str, width: float, height: float, draw: "Callable[[Axes], None]") -> str:
    """Draw into SVG that can stand in a page beside others."""
    from matplotlib import rc_context

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "lines.linewidth": 1.6,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        return _themed(figure)


def _themed(figure: "Figure") -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg ", '<svg aria-hidden="true" ', 1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    return re.sub(
        r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", text
    )
