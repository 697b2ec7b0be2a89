"""`vbus events|stats|tree`: see what a daemon does."""

import json
from collections.abc import Iterator
from typing import Any

import click
import trio

from vbus.cli.asking import as_json, ask, client, console, print_json, printable


@click.command()
@as_json
def events(as_json: bool) -> None:
    """Print every change from now on, until interrupted."""
    trio.run(_follow, as_json)


async def _follow(as_json: bool) -> None:
    async with client() as control:
        async for event in control.events():
            click.echo(json.dumps(event) if as_json else _line(event))


def _line(event: dict[str, object]) -> str:
    about = (f"{key}={value}" for key, value in event.items() if key != "event")
    return printable(f"{event['event']:<16} {' '.join(about)}".rstrip())


@click.command()
@click.argument("path", default="")
@as_json
def stats(path: str, as_json: bool) -> None:
    """Print counters: all of them, or those at PATH (guests/g1/bridge)."""
    shown = ask("stats", path=path)
    if as_json:
        print_json(shown)
        return
    for name, value in _leaves(shown, path.strip("/")):
        click.echo(printable(f"{name}: {value}"))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, object]]:
    if not isinstance(node, dict):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{path}/{key}" if path else str(key))


@click.command()
@as_json
def tree(as_json: bool) -> None:
    """Show buses with their devices and guests, and devices on no bus."""
    shown = ask("tree")
    if as_json:
        print_json(shown)
        return
    from rich.text import Text
    from rich.tree import Tree

    root = Tree("vbus")
    classes = {one["name"]: one["class"] for one in shown["devices"]}
    for bus in shown["buses"]:
        branch = root.add(Text(f"bus {bus['name']}"))
        for at in bus["devices"]:
            about = f"{at['id']}: {at['name']} ({classes[at['name']]}, {at['type']})"
            branch.add(Text(about))
        for guest in shown["guests"]:
            if guest["bus"] == bus["name"]:
                state = "attached" if guest["attached"] else "not attached"
                branch.add(Text(f"guest {guest['name']}, {state}"))
    for one in shown["devices"]:
        if not one["links"]:
            root.add(Text(f"{one['name']} ({one['class']}), on no bus"))
    console().print(root)
