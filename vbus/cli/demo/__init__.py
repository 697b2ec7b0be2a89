"""`vbus demo`: two guests and the host on one switch, as a user would set them up.

Starts the daemon and the guests as processes in network namespaces of their own, moves
traffic, plugs, kills, and prints what was measured. Nothing here is part of the bus.
"""

import os
import subprocess
import sys

import click

from vbus.cli.asking import as_json
from vbus.cli.demo import namespaces


@click.command()
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=2.0,
    show_default=True,
    help="How long each TCP transfer takes.",
)
@click.option(
    "--frames",
    is_flag=True,
    help="Generate frames instead of using TAP interfaces and namespaces.",
)
@as_json
@click.pass_context
def demo(context: click.Context, seconds: float, frames: bool, as_json: bool) -> None:
    """Show the bus at work, in network namespaces that end with it."""
    refusal = None
    if not frames:
        try:
            inside = namespaces.enter()
        except namespaces.RefusedError as error:
            refusal = str(error)
    if refusal is not None:
        click.echo(f"vbus: {refusal}; moving generated frames instead", err=True)
    options = ["--seconds", str(seconds), *(["--json"] if as_json else [])]
    command = [sys.executable, "-m", "vbus.cli.demo.scenario", *options]
    if frames or refusal is not None:
        command.append("--frames")
    else:
        command = [*inside, *command]
    context.exit(_run(command))


def _run(command: list[str]) -> int:
    """Run to the end; an interrupt reaches the child by itself, and we wait for it."""
    process = subprocess.Popen(command, env=os.environ)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
