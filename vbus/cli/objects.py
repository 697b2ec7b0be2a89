"""`vbus bus|class|device|guest`: look at what the daemon has, and change it."""

from typing import Any

import click

from vbus.cli import Tree
from vbus.cli.asking import as_json, ask, print_json, print_table, settings

_one_name = click.argument("name", required=False)


def _links(shown: dict[str, Any]) -> str:
    return " ".join(f"{link['bus']}:{link['id']}" for link in shown["links"])


def _pairs(attributes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in attributes.items())


@click.group(cls=Tree, place="bus")
def bus() -> None:
    """Buses: what guests attach to and devices are put on."""


@bus.command("add")
@click.argument("name")
def bus_add(name: str) -> None:
    """Make a bus."""
    ask("bus.add", name=name)


@bus.command("del")
@click.argument("name")
def bus_del(name: str) -> None:
    """Remove a bus that nothing uses."""
    ask("bus.remove", name=name)


@bus.command("show")
@_one_name
@as_json
def bus_show(name: str | None, as_json: bool) -> None:
    """Show buses and what is on them."""
    shown = ask("bus.show", name=name)
    if as_json:
        print_json(shown)
        return
    print_table(
        ("bus", "id", "device", "type", "guests"),
        [
            (
                one["name"],
                at.get("id", ""),
                at.get("name", ""),
                at.get("type", ""),
                " ".join(one["guests"]),
            )
            for one in shown
            for at in one["devices"] or [dict[str, Any]()]
        ],
    )


@click.group("class", cls=Tree, place="class")
def device_class() -> None:
    """Device classes: what devices can be made of."""


@device_class.command("show")
@_one_name
@as_json
def class_show(name: str | None, as_json: bool) -> None:
    """Show the classes that are installed, and their attributes."""
    shown = ask("class.show", name=name)
    if as_json:
        print_json(shown)
        return
    print_table(
        ("class", "interface type", "what it is", "attributes (* must be given)"),
        [
            (
                one["name"],
                one["type"],
                one["summary"],
                " ".join(
                    f"{key}{'*' if about['required'] else ''}"
                    for key, about in one["attributes"].items()
                ),
            )
            for one in shown
        ],
    )


@click.group(cls=Tree, place="device")
def device() -> None:
    """Devices: made of a class, put on buses."""


@device.command("add")
@click.argument("name")
@click.option("--class", "class_name", required=True, help="What to make it of.")
@click.option("--bus", "buses", multiple=True, help="Put it on this bus.")
@click.argument("attributes", nargs=-1, metavar="[KEY=VALUE]...")
def device_add(
    name: str, class_name: str, buses: tuple[str, ...], attributes: tuple[str, ...]
) -> None:
    """Make a device; guests of its buses are told at once."""
    ask(
        "device.add",
        name=name,
        class_name=class_name,
        buses=buses,
        attributes=settings(attributes),
    )


@device.command("del")
@click.argument("name")
def device_del(name: str) -> None:
    """Take a device off its buses and remove it."""
    ask("device.remove", name=name)


@device.command("set")
@click.argument("name")
@click.argument("attributes", nargs=-1, required=True, metavar="KEY=VALUE...")
def device_set(name: str, attributes: tuple[str, ...]) -> None:
    """Change attributes of a device."""
    ask("device.set", name=name, attributes=settings(attributes))


@device.command("link")
@click.argument("bus")
@click.argument("device")
def device_link(bus: str, device: str) -> None:
    """Put a device on one more bus."""
    ask("device.link", bus=bus, device=device)


@device.command("unlink")
@click.argument("bus")
@click.argument("device")
def device_unlink(bus: str, device: str) -> None:
    """Take a device off a bus; open connections end."""
    ask("device.unlink", bus=bus, device=device)


@device.command("show")
@_one_name
@as_json
def device_show(name: str | None, as_json: bool) -> None:
    """Show devices, their links and attributes."""
    shown = ask("device.show", name=name)
    if as_json:
        print_json(shown)
        return
    print_table(
        ("device", "class", "bus:id", "open by", "attributes"),
        [
            (
                one["name"],
                one["class"],
                _links(one),
                " ".join(one["connections"]),
                _pairs(one["attributes"]),
            )
            for one in shown
        ],
    )


@click.group(cls=Tree, place="guest")
def guest() -> None:
    """Guests: who may attach, and `run` to be one."""


@guest.command("add")
@click.argument("name")
@click.option("--bus", required=True, help="The bus it sees.")
@click.option("--msix/--no-msix", default=True, help="Show MSI-X beside MSI.")
@click.option("--uid", type=int, help="The user whose socket it is.")
def guest_add(name: str, bus: str, msix: bool, uid: int | None) -> None:
    """Open a socket for a guest, and print where it is."""
    about = {"name": name, "bus": bus, "msix": msix, "uid": uid}
    click.echo(ask("guest.add", guest=about)["socket"])


@guest.command("del")
@click.argument("name")
def guest_del(name: str) -> None:
    """Detach a guest and close its socket."""
    ask("guest.remove", name=name)


@guest.command("show")
@_one_name
@as_json
def guest_show(name: str | None, as_json: bool) -> None:
    """Show guests and what they have open."""
    shown = ask("guest.show", name=name)
    if as_json:
        print_json(shown)
        return
    print_table(
        ("guest", "bus", "attached", "has open", "socket"),
        [
            (
                one["name"],
                one["bus"],
                "yes" if one["attached"] else "no",
                " ".join(one["connections"]),
                one["socket"],
            )
            for one in shown
        ],
    )
