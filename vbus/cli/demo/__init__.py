"""`vbus demo`: guests and the host on one switch, as a user would set them up.

Starts the daemon and the guests as processes in network namespaces of their own, moves
traffic, plugs, kills, and prints what was measured. Nothing here is part of the bus.
"""

import os
import subprocess
import sys

import click

from vbus.cli.asking import as_json
from vbus.cli.demo import namespaces
from vbus.errors import VbusError

_PLAY = (sys.executable, "-m", "vbus.cli.demo.run")


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
@click.option(
    "--vm",
    "machines",
    is_flag=True,
    help="Two virtual machines and a process as guests; fetches what that takes.",
)
@as_json
@click.pass_context
def demo(
    context: click.Context, seconds: float, frames: bool, machines: bool, as_json: bool
) -> None:
    """Show the bus at work, in network namespaces that end with it."""
    if machines:
        context.exit(_with_machines(frames=frames, as_json=as_json))
    refusal = None
    if not frames:
        try:
            inside = namespaces.enter()
        except namespaces.RefusedError as error:
            refusal = str(error)
    if refusal is not None:
        click.echo(f"vbus: {refusal}; moving generated frames instead", err=True)
    options = ["--seconds", str(seconds), *(["--json"] if as_json else [])]
    command = [*_PLAY, *options]
    if frames or refusal is not None:
        command.append("--frames")
    else:
        command = [*inside, *command]
    context.exit(_run(command))


def _with_machines(*, frames: bool, as_json: bool) -> int:
    """Fetch while there is a network, then play. Raises VbusError, OSError."""
    from vbus.cli.demo.machine import prepare

    if frames:
        raise click.UsageError("--vm moves real traffic: leave --frames out")
    try:
        inside = namespaces.enter()
    except namespaces.RefusedError as error:
        raise VbusError(f"demo --vm: {error}: run this as root") from error
    prepare(lambda words: click.echo(words, err=True))
    return _run([*inside, *_PLAY, "--vm", *(["--json"] if as_json else [])])


def _run(command: list[str]) -> int:
    """Run to the end; an interrupt reaches the child by itself, and we wait for it."""
    process = subprocess.Popen(command, env=os.environ)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
