"""The command: measure suites round by round, then show tables or JSON."""

import json
import sys

import click
from rich.console import Console

from bench import backend, control, machine, messages, network, virtio_vm, virtqueue
from bench.harness import Results, Suite
from bench.processes import Skipped
from bench.table import as_json, show_metrics, show_targets

_WIDTH = 120

SUITES: tuple[Suite, ...] = (
    *messages.SUITES,
    *control.SUITES,
    *backend.SUITES,
    *network.SUITES,
    *virtqueue.SUITES,
)
ON_DEMAND: tuple[Suite, ...] = (*machine.SUITES, *virtio_vm.SUITES)
"""They fetch and boot a machine: measured only if `--only` names them."""


def _measure(suite: Suite, rounds: int, log: Console) -> Results | None:
    results = Results(suite)
    for nth in range(rounds):
        log.print(f"{suite.name}: round {nth + 1} of {rounds}", style="dim")
        try:
            results.rounds.append(suite.run_round())
        except Skipped as reason:
            log.print(f"{suite.name}: skipped: {reason}")
            return None
    return results


@click.command()
@click.option("--only", multiple=True, help="Suites to measure; a part of the name.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("-j", "--json", "json_", is_flag=True, help="Print one JSON object.")
@click.option("--list", "list_", is_flag=True, help="Print the suites' names.")
def main(only: tuple[str, ...], rounds: int, json_: bool, list_: bool) -> None:
    """Measure the bus beside its peers; ratios are taken inside each round."""
    known = (*SUITES, *ON_DEMAND) if only or list_ else SUITES
    chosen = [
        suite for suite in known if not only or any(o in suite.name for o in only)
    ]
    if list_:
        print("\n".join(suite.name for suite in chosen))
        return
    log = Console(file=sys.stderr)
    measured = [_measure(suite, rounds, log) for suite in chosen]
    done = [results for results in measured if results is not None]
    if json_:
        print(json.dumps(as_json(done)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    for results in done:
        show_metrics(console, results)
    show_targets(console, done)


if __name__ == "__main__":
    main()
