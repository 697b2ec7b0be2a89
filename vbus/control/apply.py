"""The daemon as a configuration, and making it as another one says.

`running` says what there is, `apply` brings it to what is desired: as much of it as is
possible, with a report of every step.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from vbus.attributes import REQUIRED
from vbus.backend.backend import Backend
from vbus.bus import BusModel, check_name, check_type
from vbus.config import BusConfig, Config, DeviceConfig
from vbus.control.plan import Attributes, Changes, Running, Step, check_names, plan
from vbus.control.show import plain
from vbus.device import Device
from vbus.errors import ConfigError, InvalidError, NotFoundError, VbusError

if TYPE_CHECKING:
    from vbus.daemon import Daemon

Perform = Callable[[str, dict[str, object]], Awaitable[object]]
Report = dict[str, object]


def running(daemon: "Daemon") -> Config:
    """Give the configuration that makes what there is now.

    Attributes nobody gave are left out: they stay at their default. So are backends
    that came by themselves, and what they brought along.
    """
    configured = daemon.config.backends
    named = daemon.backends.named
    far = [device for one in configured for device in named[one.name].kept()]
    return Config(
        daemon=daemon.config.daemon,
        buses=tuple(BusConfig(name) for name in daemon.model.buses),
        devices=(
            *(
                _device(daemon, device)
                for name, device in daemon.model.devices.items()
                if daemon.backends.of_device(name) is None
            ),
            *far,
        ),
        guests=tuple(guest.config for guest in daemon.guests.values()),
        backends=configured,
    )


def _device(daemon: "Daemon", device: Device) -> DeviceConfig:
    model = daemon.model
    exposed = daemon.exposed.get(device.name)
    return DeviceConfig(
        name=device.name,
        class_name=model.class_name(device),
        buses=tuple(bus.name for bus, _ in model.links(device)),
        attributes={
            name: _as_given(device, name, value)
            for name, value in model.given(device).items()
        },
        exposure=None if exposed is None else exposed.config,
    )


def _as_given(device: Device, name: str, value: object) -> object:
    """Give a number for the text of a command line, where it means the same."""
    declared = device.attributes[name]
    parsed = declared.parse(value)
    if isinstance(parsed, bool | int | str) and declared.parse(parsed) == parsed:
        return parsed
    return value


# Comparing


def check(daemon: "Daemon", desired: Config) -> None:
    """Raise ConfigError for what cannot be made, before anything is touched."""
    try:
        check_names(desired)
        for bus in desired.buses:
            check_name(bus.name)
        for guest in desired.guests:
            check_name(guest.name)
    except InvalidError as error:
        raise ConfigError(str(error)) from None
    for device in desired.devices:
        try:
            check_name(device.name)
            _check_device(daemon, device)
        except (InvalidError, NotFoundError) as error:
            raise ConfigError(f"device {device.name}: {error}") from None


def _check_device(daemon: "Daemon", device: DeviceConfig) -> None:
    cls = _class_of(daemon, device)
    if cls is None:
        return
    check_type(cls)
    if device.buses and not cls.type:
        raise InvalidError("has no interface to put on a bus")
    for name, value in device.attributes.items():
        if name not in cls.attributes:
            raise InvalidError(f"{cls.__name__} has no attribute {name!r}")
        cls.attributes[name].parse(value)
    for declared in cls.attributes.values():
        if declared.required and declared.name not in device.attributes:
            raise InvalidError(f"attribute {declared.name!r} is missing")


def _class_of(daemon: "Daemon", device: DeviceConfig) -> type[Device] | None:
    """Give a device's class; None if only its backend knows it, and is not up."""
    backend = daemon.backends.of_class(device)
    if backend is None:
        return daemon.model.device_class(device.class_name)
    return backend.classes.get(device.class_name)


def _desired_placed(daemon: "Daemon", desired: Config) -> Config:
    """Name the backends in which the devices would be made."""
    of = daemon.backends.of_class
    return _placed(desired, {one.name: of(one) for one in desired.devices})


def _now_placed(daemon: "Daemon") -> Config:
    """Name the backends in which the devices are."""
    now, of = running(daemon), daemon.backends.of_device
    return _placed(now, {one.name: of(one.name) for one in now.devices})


def _placed(config: Config, backends: Mapping[str, Backend | None]) -> Config:
    names = {name: one.name if one else "" for name, one in backends.items()}
    devices = tuple(
        msgspec.structs.replace(one, backend=names[one.name]) for one in config.devices
    )
    return msgspec.structs.replace(config, devices=devices)


def compare(model: BusModel, old: DeviceConfig, new: DeviceConfig) -> Attributes:
    """Say how a device's attributes differ from those desired, of the same class.

    What the device made of an attribute itself (the name of its TAP) is as good as
    what was given.
    """
    device = model.devices.get(old.name)
    if device is None:  # its backend is not up
        return _compare_unseen(old, new)
    settable: dict[str, object] = {}
    changes: dict[str, tuple[object, object]] = {}
    fixed: dict[str, tuple[object, object]] = {}
    for name in sorted(old.attributes.keys() | new.attributes.keys()):
        declared = device.attributes[name]
        default = None if declared.default is REQUIRED else declared.default
        value = new.attributes.get(name, default)
        wanted = declared.parse(value) if name in new.attributes else default
        now = device.get_attribute(name)
        given = old.attributes.get(name)
        if wanted == now or (
            name in old.attributes and declared.parse(given) == wanted
        ):
            continue
        if declared.writable and _can_be_set(device, name, value):
            settable[name] = value
            changes[name] = (now, wanted)
        else:
            fixed[name] = (now, wanted)
    return Attributes(settable, changes, fixed)


def _compare_unseen(old: DeviceConfig, new: DeviceConfig) -> Attributes:
    before, after = old.attributes, new.attributes
    names = sorted(before.keys() | after.keys())
    fixed: Changes = {
        name: (before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    }
    return Attributes({}, {}, fixed)


def _can_be_set(device: Device, name: str, value: object) -> bool:
    """Some defaults only mean "choose one": no value that could be given."""
    try:
        device.attributes[name].parse(value)
    except InvalidError:
        return False
    return True


def _world(daemon: "Daemon") -> Running:
    model = daemon.model
    devices = model.devices.values()
    return Running(
        users={one.name: model.users(one) for one in devices},
        in_use={
            **{one.name: {at.guest for at in one.connections} for one in devices},
            **{
                name: {"the machine that has its function"}
                for name, one in daemon.exposed.items()
                if one.server.attached
            },
        },
        attached={one.name for one in daemon.guests.values() if one.bridge.attached},
        compare=lambda old, new: compare(model, old, new),
    )


# Doing


async def apply(
    daemon: "Daemon", desired: Config, perform: Perform, *, dry_run: bool, force: bool
) -> list[Report]:
    """Do what makes the daemon as desired; report each step, done or why not.

    A step that is refused is tried again after the others. Raises ConfigError for a
    configuration that is wrong in itself.
    """
    check(daemon, desired)
    now, then = _now_placed(daemon), _desired_placed(daemon, desired)
    steps = plan(now, then, _world(daemon))
    done = _Applying(steps, perform, force=force)
    if not dry_run:
        await done.run()
    return done.report()


class _Applying:
    def __init__(self, steps: list[Step], perform: Perform, *, force: bool) -> None:
        self._steps = steps
        self._perform = perform
        self._done: set[int] = set()
        self._errors: dict[int, str] = {}
        self._kept: dict[str, str] = {}
        """What is not made anew, and why: nothing of it is touched."""
        for step in steps:
            if step.in_use and not force:
                users = ", ".join(step.in_use)
                self._kept[step.about] = f"in use by {users}; --force makes it anew"

    async def run(self) -> None:
        left = [
            number for number in range(len(self._steps)) if not self._why_not(number)
        ]
        while left:
            refused = [number for number in left if not await self._do(number)]
            if len(refused) == len(left):
                return
            left = refused

    def _why_not(self, number: int) -> str | None:
        step = self._steps[number]
        if step.op == "daemon.set":
            return "cannot be changed while the daemon runs: restart it"
        return self._kept.get(step.about)

    async def _do(self, number: int) -> bool:
        step = self._steps[number]
        try:
            await self._perform(step.op, step.args)
        except (VbusError, OSError) as error:
            self._errors[number] = str(error)
            return False
        except Exception as error:  # a bug of a device; the others go on
            self._errors[number] = repr(error)
            return False
        self._errors.pop(number, None)
        self._done.add(number)
        return True

    def report(self) -> list[Report]:
        return [self._report(number) for number in range(len(self._steps))]

    def _report(self, number: int) -> Report:
        step = self._steps[number]
        why = self._why_not(number) or self._errors.get(number)
        report: Report = {
            "op": step.op,
            "about": step.about,
            "args": step.args,
            "changes": plain(step.changes),
            "done": number in self._done,
        }
        return report if why is None else {**report, "error": why}
