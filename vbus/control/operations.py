"""What can be asked of a daemon: each op with the struct of its arguments.

An op is a plain or async function of the daemon and its arguments; what it returns is
shown to the client, what VbusError it raises is the refusal. `events` is not here: it
is a stream, and the server's business.
"""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from vbus.attributes import REQUIRED
from vbus.bus import Bus
from vbus.config import GuestConfig
from vbus.device import Device
from vbus.errors import InvalidError, NotFoundError
from vbus.guest import Guest
from vbus.pci.constants import Irq
from vbus.pci.function import ConfiguredFunction

if TYPE_CHECKING:
    from vbus.daemon import Daemon


class _Args(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an op."""


class Nothing(_Args, frozen=True):
    pass


class Name(_Args, frozen=True):
    name: str


class MaybeName(_Args, frozen=True):
    name: str | None = None


class Link(_Args, frozen=True):
    bus: str
    device: str


class AddDevice(_Args, frozen=True):
    name: str
    class_name: str
    buses: tuple[str, ...] = ()
    attributes: dict[str, Any] = {}


class SetAttributes(_Args, frozen=True):
    name: str
    attributes: dict[str, Any]


class AddGuest(_Args, frozen=True):
    guest: GuestConfig


class Path(_Args, frozen=True):
    path: str = ""


def show_bus(daemon: "Daemon", bus: Bus) -> dict[str, object]:
    return {
        "name": bus.name,
        "devices": [
            {"id": interface.id, "name": interface.name, "type": interface.type}
            for interface in bus.interfaces.values()
        ],
        "guests": [guest.name for guest in daemon.guests.values() if guest.bus is bus],
    }


def show_device(daemon: "Daemon", device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "class": daemon.model.class_name(device),
        "type": device.type,
        "links": [
            {"bus": bus.name, "id": interface.id}
            for bus, interface in daemon.model.links(device)
        ],
        "attributes": {
            name: _plain(device.get_attribute(name)) for name in device.attributes
        },
        "connections": [connection.guest for connection in device.connections],
    }


def show_guest(guest: Guest) -> dict[str, object]:
    return {
        "name": guest.name,
        "bus": guest.bus.name,
        "socket": str(guest.path),
        "msix": guest.config.msix,
        "attached": guest.bridge.attached,
        "pci": {
            "functions": 1,
            "bars": len(guest.bridge.config.bars),
            "vectors": guest.bridge.irq_count(Irq.MSIX)
            or guest.bridge.irq_count(Irq.MSI),
        },
        "connections": [
            connection.device.name for connection in guest.bridge.connections
        ],
    }


def _footprint(function: ConfiguredFunction) -> dict[str, int]:
    vectors = function.irq_count(Irq.MSIX) or function.irq_count(Irq.MSI)
    return {"functions": 1, "bars": len(function.config.bars), "vectors": vectors}


def _plain(value: object) -> object:
    """Make a value that msgpack knows."""
    try:
        return msgspec.to_builtins(value)
    except TypeError:
        return str(value)


def _bus_show(daemon: "Daemon", args: MaybeName) -> object:
    buses = daemon.model.buses.values() if args.name is None else ()
    chosen = buses if args.name is None else (daemon.model.bus(args.name),)
    return [show_bus(daemon, bus) for bus in chosen]


def _class_show(daemon: "Daemon", args: MaybeName) -> object:
    names = sorted(daemon.model.classes) if args.name is None else [args.name]
    return [_show_class(name, daemon.model.device_class(name)) for name in names]


def _show_class(name: str, cls: type[Device]) -> dict[str, object]:
    return {
        "name": name,
        "type": cls.type,
        "summary": (cls.__doc__ or "").partition("\n")[0],
        "attributes": {
            item.name: {
                "default": None if item.default is REQUIRED else _plain(item.default),
                "required": item.required,
                "writable": item.writable,
                "doc": item.doc,
            }
            for item in cls.attributes.values()
        },
    }


def _device_show(daemon: "Daemon", args: MaybeName) -> object:
    if args.name is not None:
        return [show_device(daemon, daemon.model.device(args.name))]
    return [show_device(daemon, device) for device in daemon.model.devices.values()]


def _device_add(daemon: "Daemon", args: AddDevice) -> object:
    device = daemon.add_device(args.name, args.class_name, args.attributes, args.buses)
    return show_device(daemon, device)


def _device_set(daemon: "Daemon", args: SetAttributes) -> object:
    for attribute, value in args.attributes.items():
        daemon.model.set_attribute(args.name, attribute, value)
    return show_device(daemon, daemon.model.device(args.name))


def _link(daemon: "Daemon", args: Link) -> object:
    return {"id": daemon.model.link(args.bus, args.device).id}


async def _guest_add(daemon: "Daemon", args: AddGuest) -> object:
    return show_guest(await daemon.add_guest(args.guest))


def _guest_show(daemon: "Daemon", args: MaybeName) -> object:
    if args.name is not None:
        return [show_guest(daemon.guest(args.name))]
    return [show_guest(guest) for guest in daemon.guests.values()]


def _tree(daemon: "Daemon", args: Nothing) -> object:
    return {
        "buses": [show_bus(daemon, bus) for bus in daemon.model.buses.values()],
        "devices": [
            show_device(daemon, device) for device in daemon.model.devices.values()
        ],
        "guests": [show_guest(guest) for guest in daemon.guests.values()],
    }


def _stats(daemon: "Daemon", args: Path) -> object:
    """Every object's statistics as one tree, or the part of it at a path."""
    node: object = {
        "daemon": {
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(os.listdir("/proc/self/fd")),
        },
        "devices": {
            name: _plain(device.statistics())
            for name, device in daemon.model.devices.items()
        },
        "guests": {
            guest.name: {
                "bridge": _plain(guest.bridge.statistics()),
                "server": _plain(guest.server.statistics()),
                "memory": _plain(guest.bridge.memory.statistics()),
            }
            for guest in daemon.guests.values()
        },
    }
    for step in filter(None, args.path.split("/")):
        if not isinstance(node, dict) or step not in node:
            raise NotFoundError(f"no statistics at {args.path!r}: {step!r} is unknown")
        node = node[step]
    return node


Operation = Callable[["Daemon", Any], Awaitable[object] | object]

OPERATIONS: dict[str, tuple[type[_Args], Operation]] = {
    "bus.add": (
        Name,
        lambda daemon, args: show_bus(daemon, daemon.model.add_bus(args.name)),
    ),
    "bus.remove": (Name, lambda daemon, args: daemon.model.remove_bus(args.name)),
    "bus.show": (MaybeName, _bus_show),
    "class.show": (MaybeName, _class_show),
    "device.add": (AddDevice, _device_add),
    "device.remove": (Name, lambda daemon, args: daemon.remove_device(args.name)),
    "device.set": (SetAttributes, _device_set),
    "device.show": (MaybeName, _device_show),
    "device.link": (Link, _link),
    "device.unlink": (
        Link,
        lambda daemon, args: daemon.model.unlink(args.bus, args.device),
    ),
    "guest.add": (AddGuest, _guest_add),
    "guest.remove": (Name, lambda daemon, args: daemon.remove_guest(args.name)),
    "guest.show": (MaybeName, _guest_show),
    "stats": (Path, _stats),
    "tree": (Nothing, _tree),
}


async def perform(daemon: "Daemon", op: str, args: dict[str, object]) -> object:
    """Do what a client asks. Raises a VbusError, or an OSError of a socket."""
    try:
        kind, operation = OPERATIONS[op]
    except KeyError:
        raise NotFoundError(f"no operation {op!r}") from None
    try:
        known = msgspec.convert(args, kind)
    except msgspec.ValidationError as error:
        raise InvalidError(f"{op}: {error}") from None
    result = operation(daemon, known)
    return await result if isinstance(result, Awaitable) else result


def errno_name(code: int | None) -> str:
    """Name an errno, as the guest ABI's page does."""
    return errno.errorcode.get(code or errno.EIO, "EIO")
