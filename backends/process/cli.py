"""`vbus backend run CLASS...`: devices in a process of their own."""

import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import get_args

import click
import trio

from backends.process.confine import Confinement
from backends.process.host import BackendHost
from vbus.backend import wire
from vbus.backend.manager import FD_VARIABLE
from vbus.bus import BusModel, check_name, installed_classes
from vbus.cli.asking import settings
from vbus.config import Isolation, runtime_dir
from vbus.device import Device
from vbus.errors import InvalidError, NotFoundError, UnreachableError
from vbus.vfio_user.transport import FdSocket


@click.command()
@click.argument("classes", nargs=-1, required=True, metavar="CLASS...")
@click.option("--name", help="What the backend is called; by default its first class.")
@click.option("--device", help="Bring a device of the first class along.")
@click.option("--bus", "buses", multiple=True, help="A bus that device is put on.")
@click.option(
    "--set",
    "attributes",
    multiple=True,
    metavar="KEY=VALUE",
    help="An attribute of that device.",
)
@click.option(
    "--isolation",
    type=click.Choice(get_args(Isolation)),
    help="Give up all but its own files; by default as the daemon says: auto.",
)
@click.option(
    "--path",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, resolve_path=True),
    help="A file or folder to open nevertheless.",
)
def run(
    classes: tuple[str, ...],
    name: str | None,
    device: str | None,
    buses: tuple[str, ...],
    attributes: tuple[str, ...],
    isolation: str | None,
    paths: tuple[Path, ...],
) -> None:
    """Run device classes in this process, for the daemon.

    CLASS is the name of an installed class, or MODULE:CLASS. Ends with the daemon.
    """
    logging.basicConfig(
        level=logging.INFO, format=f"%(levelname)s backend {name}: %(message)s"
    )
    found = dict(_class(word) for word in classes)
    first = next(iter(found))
    brought = _brought(device, first, buses, attributes)
    host = BackendHost(
        name or first,
        BusModel(found),
        FdSocket(_connect(), wire.MAX_FDS),
        brought,
        Confinement(isolation, paths),
    )
    trio.run(_run, host)


def _brought(
    device: str | None,
    class_name: str,
    buses: tuple[str, ...],
    attributes: Sequence[str],
) -> list[wire.DeviceInfo]:
    if device is None:
        if buses or attributes:
            raise click.UsageError("--bus and --set are for a --device")
        return []
    return [wire.DeviceInfo(device, class_name, buses, dict(settings(attributes)))]


def _class(word: str) -> tuple[str, type[Device]]:
    """Find a class and what it is called. Raises NotFoundError, InvalidError."""
    module, colon, name = word.partition(":")
    if colon:
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), name, None)
        called = name.lower()
    else:
        entry = installed_classes().get(word)
        if entry is None:
            raise NotFoundError(f"no device class {word!r}")
        found, called = entry.load(), word
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise InvalidError(f"{word!r} is no device class")
    check_name(called)
    return called, found


def _connect() -> socket.socket:
    """Take the socket that the daemon gave us, or go to the daemon's."""
    inherited = os.environ.pop(FD_VARIABLE, None)
    if inherited is not None:
        fd = int(inherited)
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    path = runtime_dir() / "backends.sock"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise UnreachableError(f"no daemon at {path}: {error.strerror}") from None
    return sock


async def _run(host: BackendHost) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
            await host.run()


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()
