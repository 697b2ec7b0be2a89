"""What has to be done so that a daemon is as a configuration says. Pure.

The steps are operations of the control protocol (see `operations`), in an order in
which they can be done: what is in the way goes first, guests before devices, devices
before those they use; then what is new comes, the other way round. What is the same is
in no step. An attribute that can be set is set; a device or guest that differs in
anything else is made anew, and with a device all that use it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from vbus.config import BackendConfig, Config, DeviceConfig, GuestConfig
from vbus.errors import InvalidError

Changes = dict[str, tuple[object, object]]
"""What changes: by name what it is and what it shall be."""


@dataclass(frozen=True)
class Step:
    """One operation, what it is about ("device lan0") and what it changes.

    `in_use` names who would lose a connection by it; it is not done without being
    forced then.
    """

    op: str
    about: str
    args: dict[str, object] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    in_use: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attributes:
    """What differs in a device's attributes: those to set, and the others."""

    settable: Mapping[str, object]
    settable_changes: Changes
    fixed_changes: Changes


@dataclass(frozen=True)
class Running:
    """What a plan must know of the daemon beside its configuration."""

    users: Mapping[str, Collection[str]]
    """By device: those that use it, and cannot be without it."""
    in_use: Mapping[str, Collection[str]]
    """By device: the guests that have it open."""
    attached: Collection[str]
    """Guests that are there."""
    compare: Callable[[DeviceConfig, DeviceConfig], Attributes]
    """How a device's attributes differ from those desired, for one class."""


class _Planner:
    def __init__(self, actual: Config, desired: Config, running: Running) -> None:
        self.actual, self.desired, self.running = actual, desired, running
        self.old = {one.name: one for one in actual.devices}
        self.new = {one.name: one for one in desired.devices}
        self.old_guests = {one.name: one for one in actual.guests}
        self.new_guests = {one.name: one for one in desired.guests}
        self.attributes = {
            name: running.compare(self.old[name], self.new[name])
            for name in self.old
            if name in self.new
            and self.old[name].class_name == self.new[name].class_name
        }
        self.why: dict[str, Changes] = {}
        """Devices to make anew, and because of what."""
        for name in self.old:
            if name in self.new and (changes := self._structural(name)):
                self._renew(name, changes)

    def _structural(self, name: str) -> Changes:
        """What of a device cannot be changed in place."""
        old, new = self.old[name], self.new[name]
        changes: Changes = {}
        for key in msgspec.structs.fields(DeviceConfig):
            before, after = getattr(old, key.name), getattr(new, key.name)
            if key.name not in ("attributes", "buses") and before != after:
                changes[key.encode_name] = (before, after)
        if name in self.attributes:
            changes.update(self.attributes[name].fixed_changes)
        return changes

    def _renew(self, name: str, changes: Changes) -> None:
        self.why.setdefault(name, {}).update(changes)
        for user in self.running.users.get(name, ()):
            if user in self.new and user not in self.why:
                self._renew(user, {"uses": (name, name)})

    # The steps

    def steps(self) -> Iterator[Step]:
        yield from self._daemon()
        yield from self._remove_guests()
        yield from self._unlink()
        yield from self._remove_devices()
        yield from self._buses("bus.remove", self.actual, self.desired)
        yield from self._buses("bus.add", self.desired, self.actual)
        yield from self._set()
        yield from self._add_devices()
        yield from self._link()
        yield from self._add_guests()

    def _daemon(self) -> Iterator[Step]:
        old, new = self.actual.daemon, self.desired.daemon
        changes: Changes = {
            key: (getattr(old, key), getattr(new, key))
            for key in new.__struct_fields__
            if getattr(old, key) != getattr(new, key)
        }
        if changes:
            yield Step("daemon.set", "daemon", changes=changes)
        before = {one.name: one for one in self.actual.backends}
        after = {one.name: one for one in self.desired.backends}
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                shown = (_plain(before.get(name)), _plain(after.get(name)))
                yield Step("daemon.set", f"backend {name}", changes={"backend": shown})

    @staticmethod
    def _buses(op: str, there: Config, not_there: Config) -> Iterator[Step]:
        others = {one.name for one in not_there.buses}
        for bus in there.buses:
            if bus.name not in others:
                yield Step(op, f"bus {bus.name}", {"name": bus.name})

    def _remove_guests(self) -> Iterator[Step]:
        for name, guest in self.old_guests.items():
            new = self.new_guests.get(name)
            if new != guest:
                changes = {} if new is None else _guest_changes(guest, new)
                in_use = (name,) if changes and name in self.running.attached else ()
                about = f"guest {name}"
                yield Step("guest.remove", about, {"name": name}, changes, in_use)

    def _add_guests(self) -> Iterator[Step]:
        for name, guest in self.new_guests.items():
            if self.old_guests.get(name) != guest:
                args: dict[str, object] = {"guest": msgspec.to_builtins(guest)}
                yield Step("guest.add", f"guest {name}", args)

    def _remove_devices(self) -> Iterator[Step]:
        for name in self._users_first():
            if name not in self.new or name in self.why:
                changes = self.why.get(name, {})
                in_use = self._in_use(name) if changes else ()
                about = f"device {name}"
                yield Step("device.remove", about, {"name": name}, changes, in_use)

    def _in_use(self, name: str) -> tuple[str, ...]:
        """Name the guests that lose something when a device is made anew.

        With it go those it must be made anew with; all of them wait for each other.
        """
        together = {name}
        left = [name]
        while left:
            one = left.pop()
            users = set(self.running.users.get(one, ()))
            used = {by for by, all in self.running.users.items() if one in all}
            more = (users | used) & self.why.keys() - together
            together |= more
            left += more
        found = (self.running.in_use.get(one, ()) for one in together)
        return tuple(sorted({guest for guests in found for guest in guests}))

    def _users_first(self) -> Iterator[str]:
        seen: set[str] = set()

        def visit(name: str) -> Iterator[str]:
            if name in self.old and name not in seen:
                seen.add(name)
                for user in sorted(self.running.users.get(name, ())):
                    yield from visit(user)
                yield name

        for name in reversed(self.old):
            yield from visit(name)

    def _add_devices(self) -> Iterator[Step]:
        for name, device in self.new.items():
            if name not in self.old or name in self.why:
                yield Step("device.add", f"device {name}", _add_arguments(device))

    def _set(self) -> Iterator[Step]:
        for name, differing in self.attributes.items():
            if name not in self.why and differing.settable:
                values: dict[str, object] = dict(differing.settable)
                args: dict[str, object] = {"name": name, "attributes": values}
                changes = differing.settable_changes
                yield Step("device.set", f"device {name}", args, changes)

    def _unlink(self) -> Iterator[Step]:
        for name, device in self.old.items():
            if name in self.new and name not in self.why:
                yield from _links("device.unlink", device, self.new[name])

    def _link(self) -> Iterator[Step]:
        for name, device in self.new.items():
            if name in self.old and name not in self.why:
                yield from _links("device.link", device, self.old[name])


def _add_arguments(device: DeviceConfig) -> dict[str, object]:
    """Give what `device.add` takes."""
    values = msgspec.structs.asdict(device)
    shown = values.pop("exposure")
    if shown is not None:
        values.update(expose="pci", **msgspec.structs.asdict(shown))
    return {**values, "attributes": dict(device.attributes)}


def _plain(backend: BackendConfig | None) -> object:
    return None if backend is None else msgspec.to_builtins(backend)


def _links(op: str, there: DeviceConfig, not_there: DeviceConfig) -> Iterator[Step]:
    for bus in there.buses:
        if bus not in not_there.buses:
            args: dict[str, object] = {"bus": bus, "device": there.name}
            yield Step(op, f"device {there.name}", args, {"bus": _way(op, bus)})


def _way(op: str, bus: str) -> tuple[object, object]:
    return (None, bus) if op == "device.link" else (bus, None)


def _guest_changes(old: GuestConfig, new: GuestConfig) -> Changes:
    return {
        key: (getattr(old, key), getattr(new, key))
        for key in new.__struct_fields__
        if getattr(old, key) != getattr(new, key)
    }


def plan(actual: Config, desired: Config, running: Running) -> list[Step]:
    """Give the steps from `actual` to `desired`; none if they are the same.

    Both must be sound: every name once, every bus there.
    """
    return list(_Planner(actual, desired, running).steps())


def check_names(desired: Config) -> None:
    """Raise InvalidError for what is put on a bus that is not in the file."""
    buses = {bus.name for bus in desired.buses}
    for device in desired.devices:
        for bus in device.buses:
            if bus not in buses:
                raise InvalidError(f"device {device.name}: no bus {bus!r}")
    for guest in desired.guests:
        if guest.bus not in buses:
            raise InvalidError(f"guest {guest.name}: no bus {guest.bus!r}")
