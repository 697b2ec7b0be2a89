"""One backend by name: its process if there is one, and the devices it shall have.

    down --Hello--> up --process ends--> down --supervised, too often--> failed

Its devices are made when it comes up and leave the bus when its process has ended; what
was changed meanwhile is kept and given to the next process. Transparent devices stay,
with all that guests have open, until the next process goes on with them or it failed.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import msgspec
import trio

from vbus.backend import wire
from vbus.backend.device import RemoteDevice, TransparentDevice, remote_class
from vbus.backend.link import BackendLink
from vbus.bus import BusModel
from vbus.config import BackendConfig, DeviceConfig
from vbus.device import Device
from vbus.errors import (
    BusyError,
    ExistsError,
    NoDeviceError,
    NotFoundError,
    VbusError,
)

log = logging.getLogger(__name__)
Tell = Callable[[dict[str, object]], object]


class State(Enum):
    """What of a backend's process."""

    DOWN = "down"
    """There is none, or it has not said hello."""
    UP = "up"
    FAILED = "failed"
    """It ended too often; `vbus backend restart` tries again."""


class Backend:
    """A backend's name, its process and its devices."""

    def __init__(self, config: BackendConfig, model: BusModel, tell: Tell) -> None:
        self.config = config
        self.state = State.DOWN
        self.link: BackendLink | None = None
        self.classes: dict[str, type[RemoteDevice]] = {}
        self.wanted: dict[str, DeviceConfig] = {}
        self.starts = 0
        self.standby: int | None = None
        """The process that waits to take over."""
        self.last_end = ""
        self.up = trio.Event()
        """Replaced when it goes down."""
        self._brought: set[str] = set()
        self._kept: dict[str, int] = {}
        self._model = model
        self._tell = tell

    @property
    def name(self) -> str:
        return self.config.name

    def has(self, class_name: str) -> bool:
        """Are devices of this class made here?"""
        return class_name in self.config.classes or class_name in self.classes

    # The process

    async def came_up(self, link: BackendLink, hello: wire.Hello) -> None:
        """Take a process that said hello: make its classes and devices.

        Raises BusyError if there is one already, ProtocolError for what it says.
        """
        if self.link is not None:
            raise BusyError(f"backend {self.name} has a process already")
        stays = self.config.start
        classes = {
            info.name: remote_class(link, info, stays=stays) for info in hello.classes
        }
        missing = set(self.config.classes) - set(classes)
        if missing:
            raise NotFoundError(f"backend {self.name} lacks class {min(missing)!r}")
        self.classes = classes
        self.link = link
        self.starts += 1
        self._take_along(hello.devices)
        link.welcome(self._welcome(), self._keep)
        for device in tuple(self.wanted.values()):
            await self._make_or_say(device)
        self.state = State.UP
        self.up.set()
        self._tell({"event": "backend-up", "backend": self.name})

    def _welcome(self) -> wire.Welcome:
        devices = tuple(
            wire.DeviceInfo(one.name, one.class_name, one.buses, dict(one.attributes))
            for one in self.wanted.values()
        )
        isolation, paths = self.config.isolation, self.config.paths
        return wire.Welcome(wire.VERSION, self.name, isolation, paths, devices)

    def _take_along(self, devices: Sequence[wire.DeviceInfo]) -> None:
        for one in devices:
            if one.name not in self.wanted:
                self.wanted[one.name] = DeviceConfig(
                    one.name, one.class_name, one.buses, one.attributes
                )
                self._brought.add(one.name)

    async def _make_or_say(self, wanted: DeviceConfig) -> None:
        try:
            if not await self._go_on(wanted):
                await self._make(wanted)
        except VbusError as error:
            log.warning("backend %s: device %s: %s", self.name, wanted.name, error)
            self._say_failed(wanted.name, str(error))

    async def _go_on(self, wanted: DeviceConfig) -> bool:
        """Give a device that stayed to the process that came up; False: there is none.

        Raises what the process refuses with; the device is gone then.
        """
        device, cls = self._model.devices.get(wanted.name), self._cls(wanted)
        if not isinstance(device, TransparentDevice):
            return False
        if not (issubclass(cls, TransparentDevice) and _alike(cls, type(device))):
            self._drop(device)
            return False
        link, before = self._up(), device.link
        try:
            values = await self._create(link, wanted)
        except VbusError:
            if not link.ending:
                self._drop(device)
            raise
        device.move(cls)
        for name in cls.attributes.keys() & values.keys():
            device.__dict__[name] = values[name]
        await link.adopt(before, device)
        if not link.ending:
            device.goes_on()
        return True

    async def _create(self, link: BackendLink, wanted: DeviceConfig) -> dict[str, Any]:
        kept = self._kept.get(wanted.name)
        fds = [] if kept is None else [kept]
        return await link.create(
            wanted.name, wanted.class_name, dict(wanted.attributes), fds
        )

    def _keep(self, name: str, fd: int | None) -> None:
        """Keep a descriptor for a device's next process, if it has one."""
        self.let_go(name)
        if fd is None:
            return
        wanted = self.wanted.get(name)
        cls = None if wanted is None else self.classes.get(wanted.class_name)
        if cls is not None and issubclass(cls, TransparentDevice):
            self._kept[name] = fd
        else:
            os.close(fd)

    def let_go(self, name: str | None = None) -> None:
        """Close what is kept for a device, or for all."""
        for each in [*self._kept] if name is None else [name]:
            fd = self._kept.pop(each, None)
            if fd is not None:
                os.close(fd)

    def _drop(self, device: TransparentDevice) -> None:
        """Have a device leave that nobody will go on with."""
        self.let_go(device.name)
        self._remember_buses(device)
        device.give_up()
        self._model.remove_device(device.name)

    def went_down(self, link: BackendLink, reason: str) -> None:
        """Its process has ended: its devices leave, but for transparent ones."""
        if self.link is not link:
            return
        for device in reversed(self.devices()):
            self._remember_buses(device)
            if not isinstance(device, TransparentDevice):
                self._model.remove_device(device.name)
        for name in self._brought:
            self.wanted.pop(name, None)
        self._brought.clear()
        self.link = None
        self.classes = {}
        self.state = State.DOWN
        self.last_end = reason
        self.up = trio.Event()
        self._tell({"event": "backend-down", "backend": self.name, "message": reason})

    def give_up(self) -> None:
        """It ended too often: there will be no other process unless somebody asks."""
        for device in reversed(self.devices()):
            if isinstance(device, TransparentDevice):
                self._drop(device)
        self.state = State.FAILED
        self._tell({"event": "backend-failed", "backend": self.name})

    def device_failed(self, name: str, message: str) -> None:
        """A device's own task failed there: it leaves its buses."""
        log.error("device %s failed in backend %s: %s", name, self.name, message)
        device = self._model.devices.get(name)
        if device is None:
            return
        self._remember_buses(device)
        for bus, _ in list(self._model.links(device)):
            self._model.unlink(bus.name, name)
        self._say_failed(name, message)

    def _say_failed(self, name: str, message: str) -> None:
        self._tell({"event": "device-failed", "device": name, "message": message})

    def _remember_buses(self, device: Device) -> None:
        """Keep where it is now; where it was, if it failed and left."""
        buses = tuple(bus.name for bus, _ in self._model.links(device))
        wanted = self.wanted.get(device.name)
        if wanted is not None and buses:
            self._want(wanted, buses=buses)

    # Devices

    def devices(self) -> list[RemoteDevice]:
        """Those that are there now, the oldest first."""
        return [
            device
            for device in self._model.devices.values()
            if isinstance(device, RemoteDevice) and device.name in self.wanted
        ]

    def kept(self) -> list[DeviceConfig]:
        """Those that were asked of the daemon, there or not, as they are now."""
        kept = {one.name: one for one in self.wanted.values()}
        for device in self.devices():
            buses = tuple(bus.name for bus, _ in self._model.links(device))
            kept[device.name] = msgspec.structs.replace(kept[device.name], buses=buses)
        return [one for name, one in kept.items() if name not in self._brought]

    def want(self, device: DeviceConfig) -> None:
        """Have a device made whenever the backend comes up. Raises ExistsError."""
        if device.name in self.wanted or device.name in self._model.devices:
            raise ExistsError(f"device {device.name} exists")
        self.wanted[device.name] = device

    async def add_device(self, device: DeviceConfig) -> Device:
        """Make a device. Raises what the backend, or the model, refuses with."""
        self.want(device)
        try:
            return await self._make(device)
        except BaseException:
            del self.wanted[device.name]
            raise

    async def remove_device(self, name: str) -> None:
        """Remove a device, or what is wanted of it. Raises BusyError."""
        if self.link is not None and name in self._model.devices:
            await self.link.remove(name)
        self.wanted.pop(name, None)
        self.let_go(name)
        if name in self._model.devices:
            self._model.remove_device(name)

    async def unlink(self, bus: str, name: str) -> None:
        """Take a device off a bus, when the backend has let go of its guests."""
        device = self._model.device(name)
        interface = self._model.bus(bus).find(name)
        if self.link is not None and interface.device is device:
            await self.link.retract(list(device.connections))
        self._model.unlink(bus, name)
        wanted = self.wanted[name]
        left = tuple(bus.name for bus, _ in self._model.links(device))
        self._want(wanted, buses=left)

    async def set_attribute(self, name: str, attribute: str, value: object) -> None:
        """Set an attribute. Raises what the backend refuses with."""
        values = await self._up().change(name, attribute, value)
        wanted = self.wanted[name]
        self._want(wanted, attributes={**wanted.attributes, attribute: value})
        self._model.set_attribute(name, attribute, values.get(attribute, value))

    async def set_attributes(self, name: str, values: Mapping[str, object]) -> None:
        """Set attributes, all or none. Raises what the backend refuses with."""
        device, given = self._model.device(name), self.wanted[name].attributes
        before: dict[str, object] = {}
        try:
            for attribute, value in values.items():
                now = device.get_attribute(attribute)
                await self.set_attribute(name, attribute, value)
                before[attribute] = now
        except VbusError:
            for attribute, value in reversed(before.items()):
                with suppress(VbusError):
                    await self.set_attribute(name, attribute, value)
            if name in self.wanted:
                self._want(self.wanted[name], attributes=given)
            raise

    async def count(self) -> None:
        """Bring the devices' statistics up to date."""
        counters = await self._up().count()
        for device in self.devices():
            device._counters = counters.get(device.name, {})

    async def _make(self, wanted: DeviceConfig) -> Device:
        link, cls = self._up(), self._cls(wanted)
        for bus in wanted.buses:
            self._model.bus(bus)
        values = await self._create(link, wanted)
        try:
            return self._adopt(wanted, cls, values)
        except BaseException:
            link.request(lambda id: wire.Remove(id, wanted.name), lambda _: None)
            raise

    def _cls(self, wanted: DeviceConfig) -> type[RemoteDevice]:
        try:
            return self.classes[wanted.class_name]
        except KeyError:
            raise NotFoundError(
                f"backend {self.name} has no class {wanted.class_name!r}"
            ) from None

    def _adopt(
        self, wanted: DeviceConfig, cls: type[RemoteDevice], values: dict[str, Any]
    ) -> Device:
        if self.link is None or self.link.ending:
            raise NoDeviceError(f"backend {self.name} is gone")
        device = self._model.add_device(wanted.name, wanted.class_name, values, cls=cls)
        try:
            for bus in wanted.buses:
                self._model.link(bus, wanted.name)
        except BaseException:
            self._model.remove_device(wanted.name)
            raise
        return device

    def _want(self, wanted: DeviceConfig, **changed: Any) -> None:
        self.wanted[wanted.name] = msgspec.structs.replace(wanted, **changed)

    def _up(self) -> BackendLink:
        if self.link is None:
            raise NoDeviceError(f"backend {self.name} is not up: {self.last_end}")
        return self.link


def _alike(cls: type[RemoteDevice], other: type[RemoteDevice]) -> bool:
    """Can a device of one class go on as one of the other?"""
    return (cls.type, cls.version, cls.record_area) == (
        other.type,
        other.version,
        other.record_area,
    )
