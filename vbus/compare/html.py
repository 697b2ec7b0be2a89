"""A report as one page that needs nothing else: plots, tables, light and dark."""

from collections.abc import Iterable, Iterator
from html import escape
from importlib.resources import files

from vbus.compare import plots, table, words
from vbus.compare.firmware import IO_PORTS, LOW_MEMORY
from vbus.compare.result import Measured, Report
from vbus.compare.table import Table


def page(report: Report) -> str:
    """Give the whole page. Raises NoDeviceError without matplotlib."""
    plots.need_library()
    style = files("vbus.compare").joinpath("page.css").read_text()
    body = "\n".join(_body(report))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>vbus compare</title>\n"
        f"<style>\n{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _body(report: Report) -> Iterator[str]:
    yield "<h1>One bridge, or one function per device</h1>"
    yield _lead(report)
    if report.layouts:
        yield "<h2>Cost as devices multiply</h2>"
        yield _legend(
            (one.title for one in report.layouts if one.name in plots.DRAWN),
            "A cross: there the layout stops.",
        )
        yield _grid(
            _figure(words.METRICS[name], plots.cost(report, name))
            for name in plots.COST_PLOTS
        )
        yield _table(table.limits(report))
    if report.loads:
        yield "<h2>Interrupts as load rises</h2>"
        yield _legend(words.SCHEMES.values(), _load_note(report))
        yield _grid(
            _figure(title, plots.load(report, name))
            for name, title in words.LOAD_METRICS.items()
        )
    if report.measured is not None and report.measured.points:
        yield from _measured(report.measured)
    if report.layouts:
        yield from _maps(report)
    yield "<h2>Doorbells and costs</h2>"
    yield _table(table.doorbells(report))
    yield _table(table.costs(report))
    if report.claims:
        yield "<h2>What the threads said</h2>"
        yield _table(table.claims(report))
    yield "<h2>All numbers</h2>"
    for name in words.METRICS:
        yield _details(table.metric(report, name))
    for name in words.LOAD_METRICS:
        yield _details(table.loads(report, name))
    for one in table.measured(report):
        yield _details(one)


def _lead(report: Report) -> str:
    machine = report.platform
    parts = [
        f"Machine: {machine.name} ({machine.about}), {machine.cpus} CPUs.",
        f"{words.source(report.costs)}.",
        f"Made {report.created}.",
    ]
    if report.interrupted:
        parts.append("The run was interrupted: what was not done yet is left out.")
    return (
        f"<p>{escape(' '.join(parts))}</p>"
        f'<p class="marks">{escape(words.LEGEND)}. Plots: {_origin(report)}.</p>'
    )


def _origin(report: Report) -> str:
    """Say where the plots' numbers come from."""
    if report.measured is None:
        return "modelled"
    return "modelled, except those of real guests, which were measured"


def _measured(everything: Measured) -> Iterator[str]:
    yield "<h2>Measured on real guests</h2>"
    yield f"<p>{escape(everything.machine)}.</p>"
    yield _legend(words.WAYS.values(), "Line: median; band: lowest to highest.")
    for guest, found in table.by_guest(everything):
        title = words.GUESTS[guest]
        yield f"<h3>{escape(title[0].upper() + title[1:])}</h3>"
        figures = [
            _figure(words.MEASURES[name], plots.measured(guest, found, name))
            for name in plots.MEASURED_PLOTS
            if any(name in at.quantities for at in found.points)
        ]
        if found.loads:
            drawing = plots.measured_load(guest, found, "interrupts_per_1000")
            title = f"interrupts per 1,000 messages, {found.loads[0].devices} devices"
            figures.append(_figure(title, drawing))
        yield _grid(iter(figures))


def _maps(report: Report) -> Iterator[str]:
    yield "<h2>Address space, to scale</h2>"
    yield (
        '<p class="legend"><span class="swatch s0"></span> BARs'
        ' <span class="swatch s3 half"></span> claimed by windows or segments, empty'
        ' <span class="swatch faint"></span> reserved, or no BARs in it.'
        " Behind each name, how many devices are laid out.</p>"
    )
    for space in (IO_PORTS, LOW_MEMORY):
        if any(one.name == space for at in report.layouts for one in at.map.spaces):
            wide = plots.address_map(report, space, narrow=False)
            narrow = plots.address_map(report, space, narrow=True)
            yield (
                f"<figure><figcaption>{escape(space)} (addresses in hex; modelled)"
                f'</figcaption><div class="wide">{wide}</div>'
                f'<div class="narrow">{narrow}</div></figure>'
            )


def _load_note(report: Report) -> str:
    return f"Simulated: {report.loads[0].devices} devices, one CPU."


def _legend(names: Iterable[str], note: str) -> str:
    items = " ".join(
        f'<span class="item"><span class="swatch s{number}"></span>'
        f" {escape(name)}</span>"
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{items} <span class="item">{escape(note)}</span></p>'


def _figure(title: str, drawing: str) -> str:
    caption = escape(title[0].upper() + title[1:])
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _grid(figures: Iterator[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _details(one: Table) -> str:
    return f"<details><summary>{escape(one.title)}</summary>{_rows(one)}</details>"


def _table(one: Table) -> str:
    return f"<h3>{escape(one.title)}</h3>{_rows(one)}"


def _rows(one: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in one.headings)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in one.rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
