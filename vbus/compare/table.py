"""A report as rows: of tables for a terminal, of CSV for a spreadsheet."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vbus.compare import words
from vbus.compare.costs import TITLES
from vbus.compare.result import LayoutResult, Quantities, Report

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
    for claim in report.claims:
        said = f"{claim.sentence}; on record: {claim.recorded}"
        yield ("claim", claim.row, "", ""), {"claim": claim.quantity}, said


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
