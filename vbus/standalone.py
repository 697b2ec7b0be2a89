"""One device, one bus, one guest, without a daemon: what `main(MyDevice)` runs."""

import logging
import os
import signal
from pathlib import Path

import click
import trio

from vbus.bridge import Bridge
from vbus.bus import BusModel, check_name
from vbus.device import Device
from vbus.errors import InvalidError, VbusError, innermost
from vbus.tasks import BridgeTasks
from vbus.vfio_user.server import VfioUserServer

BUS = "bus0"
GUEST = "guest"


async def serve(
    device_class: type[Device],
    socket: str | os.PathLike[str],
    attributes: dict[str, str],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a device to the guest that connects to `socket`, until cancelled.

    Started once the socket is there. Raises what the device or the socket refuses.
    """
    name = device_class.__name__.lower()
    check_name(name)
    model = BusModel({name: device_class})
    bus = model.add_bus(BUS)
    device = model.add_device(name, name, attributes)
    model.link(BUS, name)
    async with trio.open_nursery() as nursery:
        tasks = BridgeTasks(nursery)
        bridge = Bridge(bus, tasks, name=GUEST)
        tasks.failed = bridge.connection_failed
        try:
            if device.overrides("serve"):
                nursery.start_soon(device.serve)
            await VfioUserServer(bridge, socket).serve(task_status=task_status)
        finally:
            bridge.close()
            model.remove_device(name)


async def _serve_until_signal(
    device_class: type[Device], socket: Path, attributes: dict[str, str]
) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await nursery.start(_started, device_class, socket, attributes)
            click.echo(f"{device_class.type} at {socket}", err=True)
            await anext(aiter(signals))
            nursery.cancel_scope.cancel()


async def _started(
    device_class: type[Device],
    socket: Path,
    attributes: dict[str, str],
    task_status: trio.TaskStatus[None],
) -> None:
    await serve(device_class, socket, attributes, task_status=task_status)


def command(device_class: type[Device]) -> click.Command:
    """Make the command line of a device of its own."""

    @click.command(name=device_class.__name__.lower(), help=device_class.__doc__)
    @click.option(
        "--socket",
        type=click.Path(dir_okay=False, path_type=Path),
        default=Path(f"{device_class.__name__.lower()}.sock"),
        show_default=True,
        help="The vfio-user socket the guest attaches to.",
    )
    @click.argument("attributes", nargs=-1, metavar="[NAME=VALUE]...")
    def run_device(socket: Path, attributes: tuple[str, ...]) -> None:
        logging.basicConfig(level=logging.INFO)
        try:
            values = dict(_attribute(text) for text in attributes)
            trio.run(_serve_until_signal, device_class, socket, values)
        except* (VbusError, OSError) as group:
            raise click.ClickException(str(innermost(group))) from None

    return run_device


def _attribute(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidError(f"{text!r} is not NAME=VALUE")
    return name, value


def run(device_class: type[Device]) -> None:
    """Run the command line and exit."""
    command(device_class)()
