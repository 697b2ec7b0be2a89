"""What was measured, as tables for a reader and as one JSON object."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import Results, Spread, Target


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    if value >= 1e4:
        return f"{value / 1e3:.1f} k"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.low)} .. {_number(spread.high)}"


def _bound(target: Target) -> str:
    return f"{'<=' if target.at_most else '>='} {target.bound:g}"


def _probe_ratio(results: Results, name: str) -> Spread | None:
    probe = results.suite.probe_of(name)
    return results.ratio(name, probe) if probe else None


def show_metrics(console: Console, results: Results) -> None:
    """Medians and spreads of one suite, its own and the peers'."""
    table = Table(title=f"{results.suite.name}: {len(results.rounds)} rounds")
    table.add_column("what")
    table.add_column("median", justify="right")
    table.add_column("spread", justify="right")
    table.add_column("unit")
    table.add_column("/ C probe", justify="right")
    for name, metric in results.suite.metrics.items():
        spread = results.metric(name)
        if spread is None:
            table.add_row(metric.label, "not measured", "", "", "")
            continue
        ratio = _probe_ratio(results, name)
        shown = _number(ratio.median) if ratio else ""
        table.add_row(
            metric.label, _number(spread.median), _spread(spread), metric.unit, shown
        )
    console.print(table, markup=False)


def show_targets(console: Console, all_results: Iterable[Results]) -> None:
    """Each target with what was reached."""
    table = Table(title="targets")
    for column in ("what", "target", "reached", "spread", "", "later"):
        table.add_column(column)
    for results in all_results:
        for target in results.suite.targets:
            spread = results.against_target(target)
            if spread is None:
                table.add_row(target.row, _bound(target), "-", "", "not measured", "")
                continue
            verdict = "met" if target.meets(spread.median) else "NOT MET"
            table.add_row(
                target.row,
                _bound(target),
                _number(spread.median),
                _spread(spread),
                verdict,
                target.later,
            )
    console.print(table)


def as_json(all_results: Iterable[Results]) -> dict[str, Any]:
    """Give by suite: metrics (label, unit, median, low, high, probe_ratio), targets."""
    return {results.suite.name: _suite_json(results) for results in all_results}


def _suite_json(results: Results) -> dict[str, Any]:
    metrics = {}
    for name, metric in results.suite.metrics.items():
        spread, ratio = results.metric(name), _probe_ratio(results, name)
        if spread is not None:
            metrics[name] = {**vars(metric), **vars(spread)}
        if ratio is not None:
            metrics[name]["probe_ratio"] = ratio.median
    targets = []
    for target in results.suite.targets:
        spread = results.against_target(target)
        met = None if spread is None else target.meets(spread.median)
        reached = None if spread is None else vars(spread)
        targets.append(
            {
                "row": target.row,
                "bound": target.bound,
                "at_most": target.at_most,
                "reached": reached,
                "met": met,
            }
        )
    return {"metrics": metrics, "targets": targets, "rounds": results.rounds}
