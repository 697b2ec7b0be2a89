"""How buses, classes, devices, and guests look to a client.

Stable keys: programs read them with `--json`.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from vbus.attributes import REQUIRED
from vbus.backend.backend import Backend
from vbus.bus import Bus, BusModel
from vbus.device import Device
from vbus.exposed import ExposedDevice
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
            **_exposure(daemon.exposed.get(device.name)),
        }
        for device in devices
    ]


def _exposure(exposed: ExposedDevice | None) -> Shown:
    """Say how a device is shown; the function's part only where there is one."""
    if exposed is None:
        return {"expose": "bridge"}
    return {
        "expose": "pci",
        "layout": exposed.config.layout,
        "socket": str(exposed.path),
        "attached": exposed.server.attached,
        "since_attach": plain(exposed.server.client_statistics()),
    }


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


def show_backend(backend: Backend) -> Shown:
    link = backend.link
    there = {device.name for device in backend.devices()}
    return {
        "name": backend.name,
        "state": backend.state.value,
        "pid": link.process.pid if link is not None else None,
        "standby": backend.standby,
        "supervised": backend.config.start,
        "classes": sorted({*backend.config.classes, *backend.classes}),
        "devices": {name: name in there for name in backend.wanted},
        "starts": backend.starts,
        "last_end": backend.last_end,
    }


def show_tree(daemon: "Daemon") -> Shown:
    """Show all that can be managed."""
    return {
        "buses": show_buses(daemon, daemon.model.buses.values()),
        "devices": show_devices(daemon, daemon.model.devices.values()),
        "guests": [show_guest(guest) for guest in daemon.guests.values()],
    }


def plain(value: object) -> object:
    """Make a value that msgpack and JSON know; what they do not know becomes text."""
    shown: object = msgspec.to_builtins(value, str_keys=True, enc_hook=str)
    if isinstance(shown, int) and shown.bit_length() > _INT_BITS:
        return str(shown)
    return shown
