"""The daemon: owns the buses, the devices' tasks, the guests and the control socket.

Everything lives in two nurseries: guests inside of devices, so that on the way out each
guest is gone before the devices it used. What the parts do is in their own modules.
"""

import fcntl
import logging
import os
import resource
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from vbus.backend.manager import Backends
from vbus.bus import BusModel, Change, ChangeKind, Interface, check_name
from vbus.config import Config, DeviceConfig, Exposure, GuestConfig
from vbus.control.server import ControlServer
from vbus.device import Device
from vbus.errors import (
    BusyError,
    ConfigError,
    ExistsError,
    InvalidError,
    NotFoundError,
    VbusError,
    innermost,
)
from vbus.exposed import ExposedDevice
from vbus.guest import Guest
from vbus.logs import about
from vbus.metrics.server import MetricsServer, address_of
from vbus.saved import Held, Running, SavedBus, SavedClient
from vbus.sockets import Access, Listeners
from vbus.trace import Trace

logger = logging.getLogger(__name__)

Happening = dict[str, object]
"""One change as `vbus events` shows it: "event", and what it is about."""


class Predecessor(NamedTuple):
    """What a daemon before this one left; without `running` it ended suddenly."""

    running: Running | None
    held: Held


class Daemon:
    """One host's bus daemon, on a runtime directory of its own."""

    def __init__(
        self,
        config: Config,
        runtime_dir: Path,
        model: BusModel | None = None,
        listeners: Listeners | None = None,
        predecessor: Predecessor | None = None,
    ) -> None:
        """Take a configuration; nothing is made before `run`.

        It is that of the `predecessor`, if there is one.
        """
        self.config = config
        self.runtime_dir = runtime_dir
        self.model: BusModel = BusModel() if model is None else model
        self.backends = Backends(config.backends, runtime_dir, self.model, self._tell)
        self.trace = Trace(config.daemon.trace)
        self.listeners = Listeners() if listeners is None else listeners
        self._guests: dict[str, Guest] = {}
        self._exposed: dict[str, ExposedDevice] = {}
        self._watchers: list[Callable[[Happening], object]] = []
        self._serving: dict[str, trio.CancelScope] = {}
        self.access = Access()
        self.ready = False
        self.lock = -1
        """The descriptor that holds the runtime directory."""
        self.descriptors: dict[str, int] = {}
        """Of devices, which own them: what a next process is to have."""
        self.model.keep = self._keep
        self._predecessor = predecessor
        self._changes = 0
        self._closed = False
        self._stop = trio.Event()
        self._device_nursery: trio.Nursery
        self._guest_nursery: trio.Nursery

    @property
    def control_path(self) -> Path:
        return self.runtime_dir / "control.sock"

    @property
    def guests(self) -> dict[str, Guest]:
        """The guests that can attach, by name."""
        return {name: one for name, one in self._guests.items() if one.listening}

    @property
    def exposed(self) -> dict[str, ExposedDevice]:
        """The devices that are PCI functions of their own, by name."""
        return {name: one for name, one in self._exposed.items() if one.listening}

    def stop(self) -> None:
        """Let `run` close everything in order and return."""
        self._stop.set()

    async def stopped(self) -> None:
        """Wait until it was told to stop."""
        await self._stop.wait()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Make what is configured and serve until `stop`.

        Started when every socket is there. Raises BusyError if another daemon has the
        runtime directory, ConfigError for what cannot be made as configured, and what
        a device's `setup` or a socket refuses.
        """
        with self._place("daemon"):
            self.access = Access.of_group(self.config.daemon.group)
        with self._own_runtime_dir():
            _raise_file_limit()
            async with trio.open_nursery() as self._device_nursery:
                unwatch = self.model.watch(self._changed)
                try:
                    await self._device_nursery.start(self.backends.serve)
                    async with trio.open_nursery() as self._guest_nursery:
                        await self._make_all()
                        await self._serve_metrics()
                        await self._guest_nursery.start(
                            ControlServer(self, self.control_path).serve
                        )
                        self.listeners.remove_unclaimed()
                        logger.info("ready in %s", self.runtime_dir)
                        self.ready = True
                        task_status.started()
                        await self._stop.wait()
                        logger.info("stopping")
                        self._guest_nursery.cancel_scope.cancel()
                finally:
                    self._remove_devices()
                    unwatch()
                    self._device_nursery.cancel_scope.cancel()

    # What can be changed while it runs, beside the model

    async def add_device(
        self,
        name: str,
        class_name: str,
        attributes: Mapping[str, object],
        buses: Sequence[str] = (),
        exposure: Exposure | None = None,
    ) -> Device:
        """Make a device and put it on buses, or show it as a function: all or nothing.

        Raises as the model, and for a function InvalidError (the device has none of
        that layout), BusyError or OSError of the socket.
        """
        for bus in buses:
            self.model.bus(bus)
        device = self.model.add_device(name, class_name, attributes)
        try:
            for bus in buses:
                self.model.link(bus, name)
            if exposure is not None:
                await self._expose(device, exposure)
        except BaseException:
            self.model.remove_device(name)
            raise
        return device

    async def make_device(self, config: DeviceConfig) -> Device:
        """Make a device where its class lives: here, or in a backend of its own."""
        backend = self.backends.of_class(config)
        if backend is not None:
            return await backend.add_device(config)
        if self.backends.of_device(config.name) is not None:
            raise ExistsError(f"device {config.name} exists")
        return await self.add_device(
            config.name,
            config.class_name,
            config.attributes,
            config.buses,
            config.exposure,
        )

    async def remove_device(self, name: str) -> None:
        """Take a device from where it is shown and remove it; raises as the model."""
        backend = self.backends.of_device(name)
        if backend is not None:
            await backend.remove_device(name)
            return
        self.model.check_unused(name)
        exposed = self._exposed.get(name)
        if exposed is not None:
            if not exposed.listening:
                raise BusyError(f"{name} is being added")
            await exposed.remove()
            self.listeners.remove(exposed.path)
        self.model.remove_device(name)

    async def restart_device(self, name: str) -> list[str]:
        """Make a device anew: with its backend's process, or here from its attributes.

        Gives the devices that were restarted. Raises BusyError if others use it, or if
        its backend is not ours to start.
        """
        backend = self.backends.of_device(name)
        if backend is not None:
            await self.backends.restart(backend.name)
            return list(backend.wanted)
        device = self.model.device(name)
        class_name = self.model.class_name(device)
        values = dict(self.model.given(device))
        buses = [bus.name for bus, _ in self.model.links(device)]
        exposed = self._exposed.get(name)
        exposure = None if exposed is None else exposed.config
        await self.remove_device(name)
        await self.add_device(name, class_name, values, buses, exposure)
        return [name]

    def link(self, bus: str, device: str) -> Interface:
        """Put a device on a bus. Raises as the model, InvalidError: it is exposed."""
        if device in self._exposed:
            raise InvalidError(f"{device} is a PCI function of its own, and on no bus")
        return self.model.link(bus, device)

    async def add_guest(
        self,
        config: GuestConfig,
        resumed: SavedClient | None = None,
        held: Held | None = None,
    ) -> Guest:
        """Serve one more guest; its socket is there on return, and who is `resumed`.

        Raises InvalidError, ExistsError, NotFoundError (no such bus), BusyError or
        OSError of the socket.
        """
        check_name(config.name)
        if config.name in self._guests:
            raise ExistsError(f"guest {config.name} exists")
        path = self._guests_dir / f"{config.name}.sock"
        self._let_through(config.uid, self._guests_dir)
        guest = Guest(
            config,
            self.model.bus(config.bus),
            path,
            lambda event: self._tell({"event": event, "guest": config.name}),
            trace=self.trace,
            listeners=self.listeners,
            resumed=resumed,
            held=held,
        )
        self._guests[config.name] = guest
        await self._guest_nursery.start(self._serve_guest, guest)
        self._tell({"event": "guest-added", "guest": config.name, "bus": config.bus})
        return guest

    async def remove_guest(self, name: str) -> None:
        """Detach a guest, if it is attached, and close its socket."""
        guest = self.guest(name)
        await guest.remove()
        self.listeners.remove(guest.path)
        self._tell({"event": "guest-removed", "guest": name})

    def guest(self, name: str) -> Guest:
        """Give a guest. Raises NotFoundError."""
        try:
            return self.guests[name]
        except KeyError:
            raise NotFoundError(f"no guest {name!r}") from None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Do what somebody asked for. Raises BusyError while it is `closed`."""
        if self._closed:
            raise BusyError("the daemon is being replaced: ask again")
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1

    @contextmanager
    def closed(self) -> Iterator[Callable[[], bool]]:
        """Let nobody change anything; what is given says when all changes are done.

        Raises BusyError if it is closed already.
        """
        if self._closed:
            raise BusyError("the daemon is being replaced already")
        self._closed = True
        try:
            yield lambda: not self._changes
        finally:
            self._closed = False

    def watch(self, watcher: Callable[[Happening], object]) -> Callable[[], None]:
        """Call `watcher` with every change; what is returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    # Inside

    async def _expose(self, device: Device, config: Exposure) -> None:
        path = self._functions_dir / f"{device.name}.sock"
        self._let_through(config.uid, self._functions_dir)
        exposed = self._exposed[device.name] = ExposedDevice(
            device, config, path, self.listeners
        )
        await self._guest_nursery.start(self._serve_exposed, exposed)

    async def _make_all(self) -> None:
        if self._predecessor is None:
            await self._populate()
            return
        running, held = self._predecessor
        self._predecessor = None
        try:
            await self._succeed(running, held)
        finally:
            held.close()

    async def _succeed(self, running: Running | None, held: Held) -> None:
        """Make what there was, and go on with the guests that were attached.

        What cannot be any more is left out: the rest has to go on. Devices that cannot
        go on with their guests are plugged in last, so that the guests hear of it.
        """
        buses = {} if running is None else running.buses
        descriptors = {} if running is None else running.descriptors
        kept = {name: held.take(index) for name, index in descriptors.items()}
        self.model.kept.update(kept)
        for bus in self.config.buses:
            with self._surviving(f"bus {bus.name}"):
                made = self.model.add_bus(bus.name)
                if bus.name in buses:
                    made.skip_ids(buses[bus.name].next_id)
        for device in self.config.devices:
            with self._surviving(f"device {device.name}"):
                if self.backends.of_class(device) is None:
                    await self.make_device(msgspec.structs.replace(device, buses=()))
                    self._link_again(device, buses)
        for name in kept:
            left = self.model.kept.pop(name, None)
            if left is not None:
                os.close(left)
        clients = {} if running is None else running.guests
        for guest in self.config.guests:
            with self._surviving(f"guest {guest.name}"):
                added = await self.add_guest(guest, clients.get(guest.name), held)
                if guest.bus in buses:
                    added.bridge.missing(buses[guest.bus].devices.values())
        for device in self.config.devices:
            with self._surviving(f"device {device.name}"):
                await self._plug_in(device)

    def _link_again(self, device: DeviceConfig, buses: Mapping[str, SavedBus]) -> None:
        for bus in device.buses:
            if bus in buses and device.name in buses[bus].devices:
                self.model.link(bus, device.name, buses[bus].devices[device.name])

    async def _plug_in(self, device: DeviceConfig) -> None:
        if self.backends.of_class(device) is not None:
            await self._make_configured(device)
            return
        linked = {
            bus.name for bus, _ in self.model.links(self.model.device(device.name))
        }
        for bus in device.buses:
            if bus not in linked:
                self.model.link(bus, device.name)

    @contextmanager
    def _surviving(self, part: str) -> Iterator[None]:
        """Leave out what cannot be made any more."""
        try:
            yield
        except (VbusError, OSError) as error:
            logger.error("%s is left out: %s", part, error)

    async def _populate(self) -> None:
        for bus in self.config.buses:
            with self._place(f"bus {bus.name}"):
                self.model.add_bus(bus.name)
        for device in self.config.devices:
            with self._place(f"device {device.name}"):
                await self._make_configured(device)
        await self.backends.tried()
        for guest in self.config.guests:
            with self._place(f"guest {guest.name}"):
                await self.add_guest(guest)

    async def _make_configured(self, device: DeviceConfig) -> None:
        """Make a device, or leave it to its backend when that is up."""
        backend = self.backends.of_class(device)
        if backend is not None and backend.link is None:
            backend.want(device)
        else:
            await self.make_device(device)

    async def _serve_metrics(self) -> None:
        server, configured = MetricsServer(self), self.config.daemon.metrics
        path = self.runtime_dir / "metrics.sock"
        await self._guest_nursery.start(server.serve_unix, path, self.access)
        if configured is not None:
            with self._place("daemon"):
                address = address_of(configured)
            await self._guest_nursery.start(server.serve_tcp, address)

    @contextmanager
    def _place(self, part: str) -> Iterator[None]:
        """Turn what is wrong in the configuration into a ConfigError that names it."""
        try:
            yield
        except (InvalidError, NotFoundError) as error:
            raise ConfigError(f"{self.config.source}: {part}: {error}") from error

    async def _serve_guest(
        self, guest: Guest, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve a guest; once it can attach, a failure is its own and no other's."""
        try:
            await guest.serve(task_status=task_status)
        except Exception as error:
            if not guest.listening:
                raise innermost(error) from None
            with about(guest=guest.name, bus=guest.bus.name):
                logger.exception("guest %s failed", guest.name)
            self.listeners.remove(guest.path)
            what = {"guest": guest.name, "message": str(innermost(error))}
            self._tell({"event": "guest-failed", **what})
        finally:
            del self._guests[guest.name]

    async def _serve_exposed(
        self, exposed: ExposedDevice, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve a function; once it is there, a failure is its own and no other's."""
        try:
            await exposed.serve(task_status=task_status)
        except Exception as error:
            if not exposed.listening:
                raise innermost(error) from None
            logger.exception("the function of %s failed", exposed.name)
            self.listeners.remove(exposed.path)
            self._tell_failed(exposed.name, innermost(error))
        finally:
            del self._exposed[exposed.name]

    def _remove_devices(self) -> None:
        """Remove all devices, each before those it uses: the youngest first."""
        while left := list(self.model.devices):
            for name in reversed(left):
                try:
                    self.model.remove_device(name)
                except BusyError:
                    continue
                except Exception:
                    with about(device=name):
                        logger.exception("%s: removing it failed", name)
            if list(self.model.devices) == left:
                logger.error("not removed, they use each other: %s", ", ".join(left))
                return

    def _keep(self, name: str, fd: int | None) -> None:
        if fd is None:
            self.descriptors.pop(name, None)
        else:
            self.descriptors[name] = fd

    def _changed(self, change: Change) -> None:
        if change.kind is ChangeKind.DEVICE_ADDED:
            device = self.model.device(str(change.device))
            if device.overrides("serve"):
                self._device_nursery.start_soon(self._serve_device, device)
        elif change.kind is ChangeKind.DEVICE_REMOVED:
            self.descriptors.pop(str(change.device), None)
            scope = self._serving.pop(str(change.device), None)
            if scope is not None:
                scope.cancel()
        about = {
            "bus": change.bus,
            "device": change.device,
            "id": change.id,
            "attribute": change.attribute,
        }
        known = {key: value for key, value in about.items() if value is not None}
        self._tell({"event": change.kind.value, **known})

    async def _serve_device(self, device: Device) -> None:
        """Run a device's own task; when it fails nobody sees the device any more."""
        if self.model.devices.get(device.name) is not device:
            return  # removed before its task could start
        with trio.CancelScope() as scope, about(device=device.name):
            self._serving[device.name] = scope
            try:
                await device.serve()
            except Exception as error:
                logger.exception("device %s failed", device.name)
                self._tell_failed(device.name, error)
                if device.name in self._exposed:
                    self._exposed[device.name].end()
                    self.listeners.remove(self._exposed[device.name].path)
                for bus, _ in list(self.model.links(device)):
                    self.model.unlink(bus.name, device.name)

    def _tell_failed(self, device: str, error: BaseException) -> None:
        about = {"device": device, "message": str(error)}
        self._tell({"event": "device-failed", **about})

    def _tell(self, happening: Happening) -> None:
        for watcher in tuple(self._watchers):
            watcher(happening)

    @contextmanager
    def _own_runtime_dir(self) -> Iterator[None]:
        """Hold the directory: only one daemon at a time, whatever sockets lie there."""
        self.runtime_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        for folder in (self._guests_dir, self._functions_dir):
            folder.mkdir(mode=0o750, exist_ok=True)
        self.lock = self._open_lock()
        try:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another daemon runs in {self.runtime_dir}") from None
            self.access.grant(self.runtime_dir)
            yield
        finally:
            os.close(self.lock)

    def _open_lock(self) -> int:
        """Give the lock's file, which a predecessor in this process holds already."""
        if self._predecessor is not None and self._predecessor.running is not None:
            return self._predecessor.held.take(self._predecessor.running.lock)
        path = self.runtime_dir / "vbus.lock"
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def _guests_dir(self) -> Path:
        return self.runtime_dir / "guests"

    @property
    def _functions_dir(self) -> Path:
        return self.runtime_dir / "functions"

    def _let_through(self, uid: int | None, folder: Path) -> None:
        """Let another user reach a socket of his; nobody else can list them."""
        if uid in (None, os.geteuid()):
            return
        for path in (self.runtime_dir, folder):
            path.chmod(path.stat().st_mode | stat.S_IXOTH)


def _raise_file_limit() -> None:
    """Each open signal costs an eventfd: take all descriptors we may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
