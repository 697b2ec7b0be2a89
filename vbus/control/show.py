"""How buses, classes, devices, guests and their counters look to a client.

Stable keys: programs read them with `--json`.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
import trio

from vbus.attributes import REQUIRED
from vbus.bus import Bus, BusModel
from vbus.device import Device
from vbus.errors import NotFoundError
from vbus.guest import Guest
from vbus.pci.constants import Irq

if TYPE_CHECKING:
    from vbus.daemon import Daemon

Shown = dict[str, object]
_INT_BITS = 63
"""Wider numbers have no msgpack, and no exact JSON for most readers."""

logger = logging.getLogger(__name__)


def show_buses(daemon: "Daemon", buses: Iterable[Bus]) -> list[Shown]:
    guests: dict[str, list[str]] = {}
    for guest in daemon.guests.values():
        guests.setdefault(guest.bus.name, []).append(guest.name)
    return [
        {
            "name": bus.name,
            "devices": [
                {"id": interface.id, "name": interface.name, "type": interface.type}
                for interface in bus.interfaces.values()
            ],
            "guests": guests.get(bus.name, []),
        }
        for bus in buses
    ]


def show_class(model: BusModel, name: str) -> Shown:
    """Describe a class. Raises NotFoundError, or whatever its import does."""
    cls = model.device_class(name)
    return {
        "name": name,
        "type": cls.type,
        "summary": (cls.__doc__ or "").partition("\n")[0],
        "attributes": {
            item.name: {
                "default": None if item.default is REQUIRED else plain(item.default),
                "required": item.required,
                "writable": item.writable,
                "doc": item.doc,
            }
            for item in cls.attributes.values()
        },
    }


def show_classes(model: BusModel) -> list[Shown]:
    """Describe all classes; one that cannot be imported does not hide the others."""
    shown: list[Shown] = []
    for name in sorted(model.classes):
        try:
            shown.append(show_class(model, name))
        except Exception as error:
            logger.warning("device class %s: %r", name, error)
            about: Shown = {"name": name, "type": "", "summary": f"broken: {error}"}
            shown.append({**about, "attributes": {}})
    return shown


def show_devices(daemon: "Daemon", devices: Iterable[Device]) -> list[Shown]:
    links: dict[str, list[Shown]] = {}
    for bus in daemon.model.buses.values():
        for interface in bus.interfaces.values():
            link: Shown = {"bus": bus.name, "id": interface.id}
            links.setdefault(interface.name, []).append(link)
    return [
        {
            "name": device.name,
            "class": daemon.model.class_name(device),
            "type": device.type,
            "links": links.get(device.name, []),
            "attributes": {
                name: plain(device.get_attribute(name)) for name in device.attributes
            },
            "connections": sorted(one.guest for one in device.connections),
        }
        for device in devices
    ]


def show_guest(guest: Guest) -> Shown:
    config = guest.bridge.config
    vectors = guest.bridge.irq_count(Irq.MSIX) or guest.bridge.irq_count(Irq.MSI)
    return {
        "name": guest.name,
        "bus": guest.bus.name,
        "socket": str(guest.path),
        "msix": guest.config.msix,
        "attached": guest.bridge.attached,
        "pci": {"functions": 1, "bars": len(config.bars), "vectors": vectors},
        "connections": [one.device.name for one in guest.bridge.connections],
        "since_attach": plain(guest.server.client_statistics()),
    }


def show_tree(daemon: "Daemon") -> Shown:
    """Show all that can be managed."""
    return {
        "buses": show_buses(daemon, daemon.model.buses.values()),
        "devices": show_devices(daemon, daemon.model.devices.values()),
        "guests": [show_guest(guest) for guest in daemon.guests.values()],
    }


def statistics(daemon: "Daemon", path: str) -> object:
    """Give all counters as one tree, or the part at `path`. Raises NotFoundError.

    Only what is asked for is counted.
    """
    node: object = {
        "daemon": _daemon_statistics,
        "devices": {
            name: device.statistics for name, device in daemon.model.devices.items()
        },
        "guests": {
            guest.name: {
                "bridge": guest.bridge.statistics,
                "server": guest.server.statistics,
                "memory": guest.bridge.memory.statistics,
            }
            for guest in daemon.guests.values()
        },
    }
    for step in filter(None, path.split("/")):
        node = _counted(node) if callable(node) else node
        if not isinstance(node, Mapping) or step not in node:
            raise NotFoundError(f"no statistics at {path!r}: {step!r} is unknown")
        node = node[step]
    return _counted(node)


def _counted(node: object) -> object:
    if isinstance(node, Mapping):
        return {key: _counted(value) for key, value in node.items()}
    if not callable(node):
        return node
    try:
        return plain(node())
    except Exception as error:  # a device's bug must not hide all others' counters
        logger.exception("statistics failed")
        return {"error": repr(error)}


def _daemon_statistics() -> Shown:
    return {
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def plain(value: object) -> object:
    """Make a value that msgpack and JSON know; what they do not know becomes text."""
    shown: object = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    if isinstance(shown, int) and shown.bit_length() > _INT_BITS:
        return str(shown)
    return shown
