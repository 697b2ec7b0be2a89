"""A report as rows: of tables for a terminal, of CSV for a spreadsheet."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from vbus.compare import words
from vbus.compare.costs import TITLES
from vbus.compare.result import (
    LayoutResult,
    Measured,
    MeasuredPoint,
    Quantities,
    Report,
)

_SHOWN = (
    "functions",
    "vectors",
    "shared_lines",
    "io_claimed",
    "memory_claimed",
    "enumeration_hole_user",
)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, headings and rows of text."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Report, metrics: Sequence[str] = _SHOWN) -> Iterator[Table]:
    """Give what people look at."""
    yield costs(report)
    yield limits(report)
    for name in metrics:
        yield metric(report, name)
    yield doorbells(report)
    for name in words.LOAD_METRICS:
        yield loads(report, name)
    yield claims(report)
    yield from measured(report)


def costs(report: Report) -> Table:
    """What an access costs."""
    entries = report.costs.entries
    rows = [(title, words.cost(entries[name])) for name, title in TITLES.items()]
    return Table(words.source(report.costs), ("access", "cost"), rows)


def limits(report: Report) -> Table:
    """Where each layout stops."""
    rows = [
        (one.title, f"~{one.limit.devices:,}", _why(one), one.hot_plug, one.rows)
        for one in report.layouts
    ]
    headings = ("layout", "devices", "what runs out", "hot plug", "rows")
    return Table("How many devices fit", headings, rows)


def metric(report: Report, name: str) -> Table:
    """One number of every layout as devices multiply."""
    counts = _counts(report)
    rows = [
        (
            one.title,
            *(words.quantity(point.quantities.get(name)) for point in one.points),
        )
        for one in report.layouts
    ]
    title = words.METRICS[name]
    return Table(
        title[0].upper() + title[1:], ("devices", *(f"{n:,}" for n in counts)), rows
    )


def doorbells(report: Report) -> Table:
    """What each way to tell the host costs, and how many there can be."""
    rows = [
        (
            one.title,
            words.cost(one.quantities["cost"]),
            f"~{one.limit.devices:,}" if one.limit.resource else "no limit",
            _yes(one.nested),
            _yes(one.assigned),
            one.remark,
        )
        for one in report.doorbells
    ]
    headings = ("doorbell", "cost", "how many", "nested", "assigned", "on record")
    return Table("Doorbells", headings, rows)


def loads(report: Report, name: str) -> Table:
    """One number of every way to interrupt as load rises."""
    found: dict[float, dict[str, str]] = {}
    for point in report.loads:
        row = found.setdefault(point.load, {})
        row[point.scheme] = words.quantity(point.quantities.get(name))
    rows = [
        (f"{load:.0%}", *(row.get(scheme, "-") for scheme in words.SCHEMES))
        for load, row in found.items()
    ]
    devices = report.loads[0].devices if report.loads else 0
    title = f"{words.LOAD_METRICS[name]}, {devices} devices, one CPU"
    headings = ("load", *words.SCHEMES.values())
    return Table(title[0].upper() + title[1:], headings, rows)


def claims(report: Report) -> Table:
    """The sentences on record, worked out."""
    rows = [
        (
            one.row,
            one.sentence,
            one.recorded,
            words.quantity(one.quantity),
            "yes" if one.holds else "NO",
            one.note,
        )
        for one in report.claims
    ]
    headings = ("row", "sentence", "on record", "here", "holds", "note")
    return Table("What the threads said", headings, rows)


def measured(report: Report) -> Iterator[Table]:
    """What was found on real guests, the ways side by side; nothing if none was."""
    if report.measured is None:
        return
    for guest, found in by_guest(report.measured):
        yield measured_points(guest, found)
        if found.loads:
            yield measured_loads(guest, found)
    rows = [
        (f"{words.WAYS[at.layout]}, {at.guest}, {at.devices:,} and more", at.stopped)
        for at in report.measured.points
        if at.stopped is not None
    ]
    rows += report.measured.not_measured.items()
    yield Table("Not measured", ("what", "why"), rows)


def by_guest(found: Measured) -> Iterator[tuple[str, Measured]]:
    """Give what was measured on each kind of guest, if any was."""
    for guest in words.GUESTS:
        points = [at for at in found.points if at.guest == guest]
        loads = [at for at in found.loads if at.guest == guest]
        if points:
            yield guest, msgspec.structs.replace(found, points=points, loads=loads)


def measured_points(guest: str, found: Measured) -> Table:
    """A row for each number at each number of devices, a column for each way."""
    points = {(at.layout, at.devices): at for at in found.points}
    counts = sorted({devices for _, devices in points})
    rows = [
        (
            title,
            f"{count:,}",
            *(_measure(points.get((way, count)), name) for way in words.WAYS),
        )
        for name, title in words.MEASURES.items()
        for count in counts
        if any(
            at and name in at.quantities
            for at in (points.get((way, count)) for way in words.WAYS)
        )
    ]
    title = f"Measured on {words.GUESTS[guest]}: {found.machine}"
    return Table(title, ("what", "devices", *words.WAYS.values()), rows)


def _measure(at: MeasuredPoint | None, name: str) -> str:
    if at is None:
        return "-"
    one = at.quantities.get(name)
    if one is None:
        return "-"
    return words.cost(one) if one.missing else words.quantity(one)


def measured_loads(guest: str, found: Measured) -> Table:
    """Interrupts and rate by messages under way."""
    points = {(at.layout, at.in_flight): at.quantities for at in found.loads}
    names = {"interrupts_per_1000": "interrupts", "messages_per_s": "messages/s"}
    rows = [
        (
            str(in_flight),
            *(
                words.quantity(points.get((way, in_flight), {}).get(name))
                for name in names
                for way in words.WAYS
            ),
        )
        for in_flight in sorted({in_flight for _, in_flight in points})
    ]
    headings = (
        "under way",
        *(f"{said}, {way}" for said in names.values() for way in words.WAYS.values()),
    )
    title = (
        "Interrupts per 1,000 messages, and messages a second,"
        f" {found.loads[0].devices} devices, {words.GUESTS[guest]}"
    )
    return Table(title, headings, rows)


def to_csv(report: Report) -> str:
    """Write every number of a report, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        (
            "section",
            "name",
            "devices",
            "load",
            "quantity",
            "unit",
            "origin",
            "value",
            "low",
            "high",
            "rounds",
            "note",
        )
    )
    for place, quantities, note in _everything(report):
        for row in _lines(quantities, note):
            writer.writerow((*place, *row))
    return out.getvalue()


_Place = tuple[str, str, object, object]


def _everything(report: Report) -> Iterator[tuple[_Place, Quantities, str]]:
    yield ("costs", report.costs.name, "", ""), report.costs.entries, ""
    for layout in report.layouts:
        for at in layout.points:
            place: _Place = ("layout", layout.name, at.devices, "")
            yield place, at.quantities, at.stopped or ""
    for bell in report.doorbells:
        limit = bell.limit.devices if bell.limit.resource else ""
        yield ("doorbell", bell.name, limit, ""), bell.quantities, bell.remark
    for under in report.loads:
        place = ("load", under.scheme, under.devices, under.load)
        yield place, under.quantities, ""
    if report.measured is not None:
        yield from _measurements(report.measured)
    for claim in report.claims:
        said = f"{claim.sentence}; on record: {claim.recorded}"
        yield ("claim", claim.row, "", ""), {"claim": claim.quantity}, said


def _measurements(found: Measured) -> Iterator[tuple[_Place, Quantities, str]]:
    for at in found.points:
        name = f"{at.layout} ({at.guest})"
        yield ("measured", name, at.devices, ""), at.quantities, at.stopped or ""
    for under in found.loads:
        name = f"{under.layout} ({under.guest})"
        place: _Place = ("load", name, under.devices, under.in_flight)
        yield place, under.quantities, "load: messages under way"


def _lines(quantities: Quantities, note: str) -> Iterator[tuple[object, ...]]:
    """Give a line per number; one line for a place that has none."""
    if not quantities:
        yield "", "", "none", "", "", "", "", note
    for name, one in quantities.items():
        if one.missing is not None:
            yield name, one.unit, "none", "", "", "", "", one.missing
        if one.modelled is not None:
            yield name, one.unit, "modelled", one.modelled, "", "", "", note
        if one.measured is not None:
            got = one.measured
            values = (got.median, got.low, got.high, got.count)
            yield name, one.unit, "measured", *values, note


def _counts(report: Report) -> list[int]:
    return [at.devices for at in report.layouts[0].points] if report.layouts else []


def _why(one: LayoutResult) -> str:
    return one.limit.resource or one.limit.detail


def _yes(value: bool) -> str:
    return "yes" if value else "no"
