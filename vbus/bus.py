"""The bus model: device classes, devices, buses and the links between them.

Synchronous and pure: no task, no file, no guest. Whoever must act on a change watches
the model (tasks of devices, `vbus events`) or subscribes to one bus (a guest's bridge).

    add_device ---> device --link(bus)--> interface id on that bus --unlink--> device
                      |                                                          |
                      +-- set_attribute                          remove_device <-+
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from shm import Gauge
from vbus.abi import TYPE_LIMIT
from vbus.device import Device
from vbus.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
)

ENTRY_POINT_GROUP = "vbus.device_classes"
ID_LIMIT = 1 << 32
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Interface:
    """A device's presence on one bus; the id is never given to another."""

    id: int
    type: str
    name: str
    device: Device


class BusSubscriber(Protocol):
    """Who is told what comes to and leaves one bus: the bridge of a guest."""

    def added(self, interface: Interface) -> None: ...
    def dropped(self, interface: Interface) -> None: ...


class ChangeKind(Enum):
    """What happened to the model."""

    BUS_ADDED = "bus-added"
    BUS_REMOVED = "bus-removed"
    DEVICE_ADDED = "device-added"
    DEVICE_REMOVED = "device-removed"
    DEVICE_CHANGED = "device-changed"
    LINKED = "linked"
    UNLINKED = "unlinked"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the model, told after it took effect."""

    kind: ChangeKind
    bus: str | None = None
    device: str | None = None
    id: int | None = None
    attribute: str | None = None


@dataclass(frozen=True)
class BusStatistics:
    """A bus: `ids` were given since it was made."""

    devices: Gauge
    guests: Gauge
    ids: int


class Bus:
    """A namespace of interfaces that its subscribers see."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.interfaces: dict[int, Interface] = {}
        self._by_name: dict[str, Interface] = {}
        self._subscribers: list[BusSubscriber] = []
        self._next_id = 0

    @property
    def used(self) -> bool:
        """Is a device linked or a guest subscribed?"""
        return bool(self.interfaces or self._subscribers)

    def statistics(self) -> BusStatistics:
        return BusStatistics(
            len(self.interfaces), len(self._subscribers), self._next_id
        )

    def interface(self, id: int) -> Interface:
        """Find an interface by id. Raises NotFoundError."""
        try:
            return self.interfaces[id]
        except KeyError:
            raise NotFoundError(f"bus {self.name}: no interface {id}") from None

    def find(self, name: str) -> Interface:
        """Find an interface by its device's name. Raises NotFoundError."""
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFoundError(f"bus {self.name}: no device {name!r}") from None

    def subscribe(self, subscriber: BusSubscriber) -> None:
        """Tell `subscriber` what changes from now on."""
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: BusSubscriber) -> None:
        """Tell it nothing any more."""
        self._subscribers.remove(subscriber)

    @property
    def next_id(self) -> int:
        """What the next interface gets."""
        return self._next_id

    def skip_ids(self, next_id: int) -> None:
        """Give none below `next_id` any more: another daemon may have given them."""
        self._next_id = max(self._next_id, next_id)

    def add(self, device: Device, id: int | None = None) -> Interface:
        """Give a device an interface here; for `BusModel.link`."""
        if device.name in self._by_name:
            raise ExistsError(f"{device.name} is on bus {self.name} already")
        if id is None:
            if self._next_id >= ID_LIMIT:
                raise NoSpaceError(f"bus {self.name}: all ids are used up")
            id = self._next_id
            self._next_id += 1
        elif id in self.interfaces:
            raise ExistsError(f"bus {self.name}: {id} is another device's")
        interface = Interface(id, device.type, device.name, device)
        self.interfaces[interface.id] = interface
        self._by_name[device.name] = interface
        for subscriber in tuple(self._subscribers):
            subscriber.added(interface)
        return interface

    def drop(self, name: str) -> Interface:
        """Take a device's interface away; for `BusModel.unlink`."""
        interface = self.find(name)
        del self._by_name[name]
        del self.interfaces[interface.id]
        for subscriber in tuple(self._subscribers):
            subscriber.dropped(interface)
        return interface


class _Host:
    """What one device sees of the model; remembers whom it uses."""

    __slots__ = ("_model", "_name", "uses")

    def __init__(self, model: "BusModel", name: str) -> None:
        self._model = model
        self._name = name
        self.uses: set[str] = set()

    def device(self, name: str) -> Device:
        if name == self._name:
            raise InvalidError(f"{name} cannot use itself")
        found = self._model.device(name)
        self.uses.add(name)
        return found

    def keep(self, fd: int | None) -> None:
        self._model.keep(self._name, fd)

    def kept(self) -> int | None:
        return self._model.kept.pop(self._name, None)


def installed_classes() -> dict[str, EntryPoint]:
    """Find the device classes of all installed distributions; none is imported yet."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


class BusModel:
    """All that one host's administrator can see and change."""

    def __init__(
        self, classes: Mapping[str, type[Device] | EntryPoint] | None = None
    ) -> None:
        self.classes: dict[str, type[Device] | EntryPoint] = dict(
            installed_classes() if classes is None else classes
        )
        self.devices: dict[str, Device] = {}
        self.buses: dict[str, Bus] = {}
        self._hosts: dict[str, _Host] = {}
        self._class_names: dict[str, str] = {}
        self._given: dict[str, dict[str, object]] = {}
        self._watchers: list[Callable[[Change], object]] = []
        self.keep: Callable[[str, int | None], object] = lambda name, fd: None
        """What a device's `Host.keep` does."""
        self.kept: dict[str, int] = {}
        """What a device's `Host.kept` will take."""

    # Looking

    def device_class(self, name: str) -> type[Device]:
        """Give a class, imported on first use. Raises NotFoundError."""
        found = self.classes.get(name)
        if found is None:
            raise NotFoundError(f"no device class {name!r}")
        if isinstance(found, EntryPoint):
            loaded = found.load()
            if not (isinstance(loaded, type) and issubclass(loaded, Device)):
                raise InvalidError(f"device class {name!r}: {loaded!r} is no Device")
            self.classes[name] = found = loaded
        return found

    def device(self, name: str) -> Device:
        """Give a device. Raises NotFoundError."""
        try:
            return self.devices[name]
        except KeyError:
            raise NotFoundError(f"no device {name!r}") from None

    def bus(self, name: str) -> Bus:
        """Give a bus. Raises NotFoundError."""
        try:
            return self.buses[name]
        except KeyError:
            raise NotFoundError(f"no bus {name!r}") from None

    def class_name(self, device: Device) -> str:
        """Give the name a device's class was asked for by."""
        return self._class_names[device.name]

    def given(self, device: Device) -> Mapping[str, object]:
        """Give the attributes somebody asked for, as they were asked for."""
        return self._given[device.name]

    def links(self, device: Device) -> Iterator[tuple[Bus, Interface]]:
        """Iterate over the buses a device is on."""
        for bus in tuple(self.buses.values()):
            for interface in tuple(bus.interfaces.values()):
                if interface.device is device:
                    yield bus, interface

    def users(self, device: Device) -> list[str]:
        """Name the devices that need this one."""
        return [name for name, host in self._hosts.items() if device.name in host.uses]

    def watch(self, watcher: Callable[[Change], object]) -> Callable[[], None]:
        """Call `watcher` after each change; what is returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    # Changing

    def add_bus(self, name: str) -> Bus:
        """Make a bus. Raises InvalidError, ExistsError."""
        check_name(name)
        if name in self.buses:
            raise ExistsError(f"bus {name} exists")
        bus = self.buses[name] = Bus(name)
        self._tell(Change(ChangeKind.BUS_ADDED, bus=name))
        return bus

    def remove_bus(self, name: str) -> None:
        """Remove a bus without devices and guests. Raises BusyError."""
        if self.bus(name).used:
            raise BusyError(f"bus {name} still has devices or guests")
        del self.buses[name]
        self._tell(Change(ChangeKind.BUS_REMOVED, bus=name))

    def add_device(
        self,
        name: str,
        class_name: str,
        attributes: Mapping[str, object] | None = None,
        cls: type[Device] | None = None,
    ) -> Device:
        """Make a device and let it set itself up; `cls` if it is no class of ours.

        Raises InvalidError, ExistsError, NotFoundError, or what its `setup` raises;
        nothing is left of it then.
        """
        check_name(name)
        if name in self.devices:
            raise ExistsError(f"device {name} exists")
        cls = self.device_class(class_name) if cls is None else cls
        check_type(cls)
        host = _Host(self, name)
        device = cls(name, host, **(attributes or {}))
        device.setup()
        self.devices[name] = device
        self._hosts[name] = host
        self._class_names[name] = class_name
        self._given[name] = dict(attributes or {})
        self._tell(Change(ChangeKind.DEVICE_ADDED, device=name))
        return device

    def remove_device(self, name: str) -> None:
        """Unlink a device everywhere and remove it. BusyError: others use it."""
        self.check_unused(name)
        device = self.device(name)
        for bus, _ in list(self.links(device)):
            self.unlink(bus.name, name)
        del self.devices[name]
        del self._hosts[name]
        del self._class_names[name]
        del self._given[name]
        try:
            device.teardown()
        finally:
            self._tell(Change(ChangeKind.DEVICE_REMOVED, device=name))

    def check_unused(self, name: str) -> None:
        """Raise BusyError if other devices use this one, NotFoundError."""
        users = self.users(self.device(name))
        if users:
            raise BusyError(f"{name} is used by {', '.join(sorted(users))}")

    def link(self, bus_name: str, device_name: str, id: int | None = None) -> Interface:
        """Put a device on a bus, where guests see it; `id` if it had one before.

        Raises NotFoundError, ExistsError, and InvalidError for a device without an
        interface type.
        """
        bus = self.bus(bus_name)
        device = self.device(device_name)
        if not device.type:
            raise InvalidError(f"{device_name} has no interface to put on a bus")
        interface = bus.add(device, id)
        self._tell(
            Change(ChangeKind.LINKED, bus=bus_name, device=device_name, id=interface.id)
        )
        return interface

    def unlink(self, bus_name: str, device_name: str) -> None:
        """Take a device off a bus; open connections end. Raises NotFoundError."""
        interface = self.bus(bus_name).drop(device_name)
        self._tell(
            Change(
                ChangeKind.UNLINKED, bus=bus_name, device=device_name, id=interface.id
            )
        )

    def set_attribute(self, device_name: str, attribute: str, value: object) -> None:
        """Set a writable attribute; raises as `Device.set_attributes` does."""
        self.set_attributes(device_name, {attribute: value})

    def set_attributes(self, device_name: str, values: Mapping[str, object]) -> None:
        """Set writable attributes, all or none; raises as `Device.set_attributes`."""
        self.device(device_name).set_attributes(values)
        self._given[device_name].update(values)
        for name in values:
            self._tell(
                Change(ChangeKind.DEVICE_CHANGED, device=device_name, attribute=name)
            )

    def _tell(self, change: Change) -> None:
        for watcher in tuple(self._watchers):
            watcher(change)


def check_name(name: str) -> None:
    """Raise InvalidError for what may not name a device or a bus."""
    if not _NAME.fullmatch(name):
        raise InvalidError(
            f"bad name {name!r}: [a-z0-9][a-z0-9._-]*, at most 63 characters"
        )


def check_type(cls: type[Device]) -> None:
    """Raise InvalidError for an interface type that does not fit into DEVADD."""
    encoded = cls.type.encode()
    if len(encoded) > TYPE_LIMIT or b"\0" in encoded:
        raise InvalidError(
            f"interface type {cls.type!r} has a NUL or over {TYPE_LIMIT} bytes"
        )
