"""What can be asked of a daemon: each op with the struct of its arguments.

An op is a plain or async function of the daemon and its arguments; what it returns is
shown to the client, what VbusError it raises is the refusal. What is answered on and
on is in `streams`.
"""

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vbus.config import (
    DeviceConfig,
    Expose,
    GuestConfig,
    SpinUs,
    Uid,
    exposure,
    from_document,
    to_document,
)
from vbus.control.apply import apply, running
from vbus.control.show import (
    show_backend,
    show_buses,
    show_class,
    show_classes,
    show_devices,
    show_guest,
    show_tree,
)
from vbus.control.statistics import statistics
from vbus.errors import InvalidError, NotFoundError

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
    expose: Expose = "bridge"
    layout: str | None = None
    uid: Uid | None = None
    spin_us: SpinUs | None = None
    backend: str = ""


class SetAttributes(_Args, frozen=True):
    name: str
    attributes: dict[str, Any]


class AddGuest(_Args, frozen=True):
    guest: GuestConfig


class Desired(_Args, frozen=True):
    document: dict[str, Any]
    dry_run: bool = False
    force: bool = False


class StatsPath(_Args, frozen=True):
    path: str = ""


def _bus_add(daemon: "Daemon", args: Name) -> object:
    return show_buses(daemon, [daemon.model.add_bus(args.name)])[0]


def _bus_remove(daemon: "Daemon", args: Name) -> object:
    daemon.model.remove_bus(args.name)
    return {"name": args.name}


def _bus_show(daemon: "Daemon", args: MaybeName) -> object:
    model = daemon.model
    buses = model.buses.values() if args.name is None else [model.bus(args.name)]
    return show_buses(daemon, buses)


def _class_show(daemon: "Daemon", args: MaybeName) -> object:
    if args.name is not None:
        return [show_class(daemon.model, args.name)]
    return show_classes(daemon.model)


async def _device_add(daemon: "Daemon", args: AddDevice) -> object:
    shown = exposure(args.expose, args.buses, args.layout, args.uid, args.spin_us)
    device = await daemon.make_device(
        DeviceConfig(
            args.name,
            args.class_name,
            args.buses,
            args.attributes,
            shown,
            args.backend,
        )
    )
    return show_devices(daemon, [device])[0]


async def _device_remove(daemon: "Daemon", args: Name) -> object:
    await daemon.remove_device(args.name)
    return {"name": args.name}


async def _device_set(daemon: "Daemon", args: SetAttributes) -> object:
    """Set attributes: all, or none."""
    backend = daemon.backends.of_device(args.name)
    if backend is not None:
        await backend.set_attributes(args.name, args.attributes)
    else:
        daemon.model.set_attributes(args.name, args.attributes)
    return show_devices(daemon, [daemon.model.device(args.name)])[0]


def _device_show(daemon: "Daemon", args: MaybeName) -> object:
    model = daemon.model
    if args.name is None:
        return show_devices(daemon, model.devices.values())
    return show_devices(daemon, [model.device(args.name)])


def _link(daemon: "Daemon", args: Link) -> object:
    interface = daemon.link(args.bus, args.device)
    return {"bus": args.bus, "device": args.device, "id": interface.id}


async def _unlink(daemon: "Daemon", args: Link) -> object:
    backend = daemon.backends.of_device(args.device)
    if backend is not None:
        await backend.unlink(args.bus, args.device)
    else:
        daemon.model.unlink(args.bus, args.device)
    return {"bus": args.bus, "device": args.device}


async def _guest_add(daemon: "Daemon", args: AddGuest) -> object:
    return show_guest(await daemon.add_guest(args.guest))


async def _guest_remove(daemon: "Daemon", args: Name) -> object:
    await daemon.remove_guest(args.name)
    return {"name": args.name}


def _guest_show(daemon: "Daemon", args: MaybeName) -> object:
    if args.name is not None:
        return [show_guest(daemon.guest(args.name))]
    return [show_guest(guest) for guest in daemon.guests.values()]


def _backend_show(daemon: "Daemon", args: MaybeName) -> object:
    if args.name is not None:
        return [show_backend(daemon.backends.backend(args.name))]
    return [show_backend(one) for one in daemon.backends.named.values()]


async def _backend_restart(daemon: "Daemon", args: Name) -> object:
    await daemon.backends.restart(args.name)
    return show_backend(daemon.backends.backend(args.name))


async def _device_restart(daemon: "Daemon", args: Name) -> object:
    return {"restarted": await daemon.restart_device(args.name)}


def _config(daemon: "Daemon", args: Nothing) -> object:
    return to_document(running(daemon))


async def _apply(daemon: "Daemon", args: Desired) -> object:
    return await apply(
        daemon,
        from_document(args.document),
        lambda op, step: perform(daemon, op, step),
        dry_run=args.dry_run,
        force=args.force,
    )


def _tree(daemon: "Daemon", args: Nothing) -> object:
    return show_tree(daemon)


async def _stats(daemon: "Daemon", args: StatsPath) -> object:
    if args.path.strip("/").partition("/")[0] in ("", "device", "devices"):
        await daemon.backends.count()
    return statistics(daemon, args.path)


Operation = Callable[["Daemon", Any], Awaitable[object] | object]

OPERATIONS: dict[str, tuple[type[_Args], Operation]] = {
    "backend.restart": (Name, _backend_restart),
    "backend.show": (MaybeName, _backend_show),
    "bus.add": (Name, _bus_add),
    "bus.remove": (Name, _bus_remove),
    "bus.show": (MaybeName, _bus_show),
    "class.show": (MaybeName, _class_show),
    "device.add": (AddDevice, _device_add),
    "device.remove": (Name, _device_remove),
    "device.set": (SetAttributes, _device_set),
    "device.show": (MaybeName, _device_show),
    "device.restart": (Name, _device_restart),
    "device.link": (Link, _link),
    "device.unlink": (Link, _unlink),
    "guest.add": (AddGuest, _guest_add),
    "guest.remove": (Name, _guest_remove),
    "guest.show": (MaybeName, _guest_show),
    "config": (Nothing, _config),
    "apply": (Desired, _apply),
    "stats": (StatsPath, _stats),
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
