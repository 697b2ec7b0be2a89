"""`vbus backend`: the processes that devices live in; `run` is one."""

import click

from vbus.cli import Tree
from vbus.cli.asking import act, as_json, ask, print_json, print_table


@click.group(cls=Tree, place="backend")
def backend() -> None:
    """Backends: processes that devices live in; `run` to be one."""


@backend.command("show")
@click.argument("name", required=False)
@as_json
def backend_show(name: str | None, as_json: bool) -> None:
    """Show backends, their processes and devices."""
    shown = ask("backend.show", name=name)
    if as_json:
        print_json(shown)
        return
    print_table(
        (
            *("backend", "state", "process", "standby", "classes", "devices"),
            *("starts", "last end"),
        ),
        [
            (
                one["name"],
                one["state"],
                one["pid"] or "",
                one["standby"] or "",
                " ".join(one["classes"]),
                " ".join(one["devices"]),
                one["starts"],
                one["last_end"],
            )
            for one in shown
        ],
    )


@backend.command("restart")
@click.argument("name")
@as_json
def backend_restart(name: str, as_json: bool) -> None:
    """End a backend's process and start it anew; its devices come back."""
    act("backend.restart", name=name, as_json=as_json)
