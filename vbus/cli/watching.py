"""`vbus events|stats|tree`: see what a daemon does."""

import json
from collections.abc import Iterator
from typing import Any

import click
import trio

from vbus.cli.asking import as_json, ask, client, console, print_json, printable


@click.command()
@click.option("--tree", is_flag=True, help="Begin with all there is.")
@as_json
def events(tree: bool, as_json: bool) -> None:
    """Print every change from now on, each as JSON on a line, until interrupted.

    The first line says from where on: {"event": "start"}, or with --tree
    {"event": "tree", ...}. Nothing is lost after it, unless a line says so:
    {"event": "lost", "count": n}.
    """
    trio.run(_follow, tree)


async def _follow(tree: bool) -> None:
    async with client() as control:
        async for event in control.events(tree=tree):
            click.echo(json.dumps(event))


@click.command()
@click.argument("path", default="")
@as_json
def stats(path: str, as_json: bool) -> None:
    """Print counters: all of them, or those at PATH.

    A PATH is daemon, bus/NAME, device/NAME, guest/NAME, and deeper: guest/g1/bridge.
    """
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
