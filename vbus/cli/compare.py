"""`vbus compare`: one bridge or one function per device, by model, by measurement."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from vbus.cli import EXIT_INTERRUPTED
from vbus.cli.asking import print_table, printable
from vbus.compare import run, table, words
from vbus.compare.costs import PUBLISHED, TITLES, check
from vbus.compare.platforms import PLATFORMS, Q35
from vbus.compare.result import Costs, Report, encode, load
from vbus.errors import NoDeviceError

_FILE = click.Path(dir_okay=False, path_type=Path)


def _devices(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...]:
    if value is None:
        return run.DEVICES
    try:
        counts = tuple(sorted({int(word) for word in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers between commas") from None
    if counts[0] < 1 or counts[-1] > run.MOST_DEVICES:
        raise click.BadParameter(f"from 1 to {run.MOST_DEVICES:,}")
    return counts


@click.group(invoke_without_command=True)
@click.option(
    "--platform",
    type=click.Choice(list(PLATFORMS)),
    default=Q35.name,
    show_default=True,
    help="The machine to lay out on: QEMU's q35, or the rules of PCI alone.",
)
@click.option(
    "--devices",
    callback=_devices,
    metavar="N,...",
    help=f"How many devices.  [default: {','.join(map(str, run.DEVICES))}]",
)
@click.option(
    "--costs",
    "costs_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A cost model of `vbus compare calibrate`; without it, the published one.",
)
@click.option(
    "--measure",
    "measured",
    is_flag=True,
    help="Measure both ways as well, with daemons and guests started for it.",
)
@click.option(
    "--guests",
    type=click.Choice(["process", "vm", "both"]),
    help="What is measured: guests that are processes, virtual machines, or both."
    "  [default: both, if machines are to be had; vm fetches what is missing]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 99),
    default=run.ROUNDS,
    show_default=True,
    help="How often each measurement is repeated; on machines three times at most.",
)
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a number a line.")
@click.option("--html", "html_file", type=_FILE, help="Write one page with plots.")
@click.pass_context
def compare(
    context: click.Context,
    platform: str,
    devices: tuple[int, ...],
    costs_file: Path | None,
    measured: bool,
    guests: str | None,
    rounds: int,
    as_json: bool,
    as_csv: bool,
    html_file: Path | None,
) -> None:
    """Compare a bridge with a PCI function per device: what each layout costs."""
    if context.invoked_subcommand is not None:
        return
    if as_json and as_csv:
        raise click.UsageError("--json and --csv are two forms of the same output")
    costs = PUBLISHED if costs_file is None else _load(costs_file)
    if html_file is not None:
        from vbus.compare import plots

        plots.need_library()
    kinds, why = _kinds(guests) if measured else ((), "")
    with _progress(run.STEPS) as step:
        report = run.model(PLATFORMS[platform], costs, devices, step)
    if measured and not report.interrupted:
        report = _measure(report, devices, kinds, rounds, why)
    _write_html(report, html_file)
    if as_json:
        click.echo(encode(report), nl=False)
    elif as_csv:
        click.echo(table.to_csv(report), nl=False)
    else:
        _print(report)
    if report.interrupted:
        context.exit(EXIT_INTERRUPTED)


@compare.command()
@click.option("-o", "--output", type=_FILE, help="Where to write the JSON as well.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate(output: Path | None, as_json: bool) -> None:
    """Measure this machine's exits and doorbells with a tiny guest through KVM."""
    from vbus.compare import calibrate as calibration

    with _progress(calibration.STEPS) as step:
        costs = calibration.calibrate(step)
    if output is not None:
        output.write_text(encode(costs))
    if as_json:
        click.echo(encode(costs), nl=False)
        return
    rows = [(title, words.cost(costs.entries[name])) for name, title in TITLES.items()]
    print_table(("access", "cost"), rows, words.source(costs))
    click.echo(words.LEGEND)


def _load(path: Path) -> Costs:
    return check(load(path, Costs))


def _kinds(guests: str | None) -> tuple[tuple[str, ...], str]:
    """Give the kinds of guest to measure, and why there are no machines among them.

    Raises NoDeviceError, before anything is done, if those were asked for.
    """
    from vbus.compare import machines
    from vbus.compare.measure import MACHINE, PROCESS

    if guests == "process":
        return (PROCESS,), ""
    if guests is not None:
        machines.prepare(lambda what: click.echo(what, err=True))
    if not (why := machines.unavailable()):
        return ((MACHINE,) if guests == "vm" else (PROCESS, MACHINE)), ""
    if guests is not None:
        raise NoDeviceError(f"no virtual machine here: {why}")
    click.echo(f"processes only, no virtual machine: {why}", err=True)
    return (PROCESS,), why


def _measure(
    report: Report,
    devices: tuple[int, ...],
    kinds: tuple[str, ...],
    rounds: int,
    why: str,
) -> Report:
    from vbus.compare import measure

    subjects = measure.subjects(kinds, rounds)
    missing = {"virtual machines": why} if why else {}
    with _progress(measure.steps(devices, subjects)) as step:
        found, interrupted = measure.measure(devices, subjects, step, missing)
    return msgspec.structs.replace(report, measured=found, interrupted=interrupted)


def _write_html(report: Report, path: Path | None) -> None:
    if path is not None:
        from vbus.compare import html

        path.write_text(html.page(report))


def _print(report: Report) -> None:
    for one in table.tables(report):
        print_table(one.headings, one.rows, one.title)
    click.echo(words.LEGEND)
    if report.interrupted:
        click.echo("interrupted: what was not done yet is left out", err=True)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show how far it is on stderr, if somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=steps)
        done = iter(range(steps))

        def step(what: str) -> None:
            progress.update(
                task, completed=next(done, steps), description=printable(what)
            )

        yield step
