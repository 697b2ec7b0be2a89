"""`vbus bus|class|device|guest`: look at what the daemon has, and change it."""

from typing import Any, get_args

import click

from vbus.cli import Tree
from vbus.cli.asking import act, as_json, ask, print_json, print_table, settings
from vbus.config import Expose

_one_name = click.argument("name", required=False)


def _print_since_attach(shown: dict[str, Any]) -> None:
    print_table(
        ("since it attached", "count"),
        [(key, str(value)) for key, value in shown["since_attach"].items()],
    )


def _links(shown: dict[str, Any]) -> str:
    return " ".join(f"{link['bus']}:{link['id']}" for link in shown["links"])


def _pairs(attributes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in attributes.items())


@click.group(cls=Tree, place="bus")
def bus() -> None:
    """Buses: what guests attach to and devices are put on."""


@bus.command("add")
@click.argument("name")
@as_json
def bus_add(name: str, as_json: bool) -> None:
    """Make a bus."""
    act("bus.add", name=name, as_json=as_json)


@bus.command("del")
@click.argument("name")
@as_json
def bus_del(name: str, as_json: bool) -> None:
    """Remove a bus that nothing uses."""
    act("bus.remove", name=name, as_json=as_json)


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
@click.option(
    "--expose",
    type=click.Choice(get_args(Expose)),
    default="bridge",
    show_default=True,
    help="Behind the bridge of guests, or as a PCI function of its own.",
)
@click.option("--layout", help="The function's registers; modern by default.")
@click.option("--uid", type=click.IntRange(0), help="The user of its socket.")
@click.option(
    "--spin-us",
    type=click.FloatRange(0),
    help="How long its queues look for requests before they sleep.",
)
@click.option("--backend", default="", help="Which backend makes it.")
@click.argument("attributes", nargs=-1, metavar="[KEY=VALUE]...")
@as_json
def device_add(
    name: str,
    class_name: str,
    buses: tuple[str, ...],
    expose: str,
    layout: str | None,
    uid: int | None,
    spin_us: float | None,
    backend: str,
    attributes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a device; guests of its buses are told at once."""
    act(
        "device.add",
        name=name,
        class_name=class_name,
        buses=buses,
        expose=expose,
        layout=layout,
        uid=uid,
        spin_us=spin_us,
        backend=backend,
        attributes=settings(attributes),
        as_json=as_json,
    )


@device.command("del")
@click.argument("name")
@as_json
def device_del(name: str, as_json: bool) -> None:
    """Take a device off its buses and remove it."""
    act("device.remove", name=name, as_json=as_json)


@device.command("restart")
@click.argument("name")
@as_json
def device_restart(name: str, as_json: bool) -> None:
    """Make a device anew, with its backend's process if it has one of its own."""
    act("device.restart", name=name, as_json=as_json)


@device.command("set")
@click.argument("name")
@click.argument("attributes", nargs=-1, required=True, metavar="KEY=VALUE...")
@as_json
def device_set(name: str, attributes: tuple[str, ...], as_json: bool) -> None:
    """Change attributes of a device."""
    act("device.set", name=name, attributes=settings(attributes), as_json=as_json)


@device.command("link")
@click.argument("bus")
@click.argument("device")
@as_json
def device_link(bus: str, device: str, as_json: bool) -> None:
    """Put a device on one more bus."""
    act("device.link", bus=bus, device=device, as_json=as_json)


@device.command("unlink")
@click.argument("bus")
@click.argument("device")
@as_json
def device_unlink(bus: str, device: str, as_json: bool) -> None:
    """Take a device off a bus; open connections end."""
    act("device.unlink", bus=bus, device=device, as_json=as_json)


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
    functions = [one for one in shown if one["expose"] == "pci"]
    if functions:
        _print_functions(functions)
        if name is not None:
            _print_since_attach(shown[0])


def _print_functions(functions: list[dict[str, Any]]) -> None:
    print_table(
        ("function", "layout", "attached", "socket"),
        [
            (
                one["name"],
                one["layout"],
                "yes" if one["attached"] else "no",
                one["socket"],
            )
            for one in functions
        ],
    )


@click.group(cls=Tree, place="guest")
def guest() -> None:
    """Guests: who may attach, and `run` to be one."""


@guest.command("add")
@click.argument("name")
@click.option("--bus", required=True, help="The bus it sees.")
@click.option("--msix/--no-msix", default=True, help="Show MSI-X beside MSI.")
@click.option("--uid", type=click.IntRange(0), help="The user whose socket it is.")
@click.option(
    "--allow-truncatable",
    is_flag=True,
    help="Take memory that could shrink, and with it the risk of SIGBUS.",
)
@click.option(
    "--spin-us",
    type=click.FloatRange(0, 10_000),
    help="Look for the next message so long before sleeping.",
)
@click.option(
    "--call-timeout-s",
    type=click.FloatRange(0, 3600, min_open=True),
    help="The deadline of each call of a device.",
)
@as_json
def guest_add(as_json: bool, **options: object) -> None:
    """Open a socket for a guest, and print where it is."""
    given = {key: value for key, value in options.items() if value is not None}
    added = ask("guest.add", guest=given)
    if as_json:
        print_json(added)
    else:
        click.echo(added["socket"])


@guest.command("del")
@click.argument("name")
@as_json
def guest_del(name: str, as_json: bool) -> None:
    """Detach a guest and close its socket."""
    act("guest.remove", name=name, as_json=as_json)


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
    if name is not None:
        _print_since_attach(shown[0])
