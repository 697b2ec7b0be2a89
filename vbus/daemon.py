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

import trio

from vbus.bus import BusModel, Change, ChangeKind, check_name
from vbus.config import Config, GuestConfig
from vbus.control.server import ControlServer
from vbus.device import Device
from vbus.errors import (
    BusyError,
    ConfigError,
    ExistsError,
    InvalidError,
    NotFoundError,
)
from vbus.guest import Guest
from vbus.sockets import Listeners

logger = logging.getLogger(__name__)

Happening = dict[str, object]
"""One change as `vbus events` shows it: "event", and what it is about."""


class Daemon:
    """One host's bus daemon, on a runtime directory of its own."""

    def __init__(
        self,
        config: Config,
        runtime_dir: Path,
        model: BusModel | None = None,
        listeners: Listeners | None = None,
    ) -> None:
        """Take a configuration; nothing is made before `run`."""
        self.config = config
        self.runtime_dir = runtime_dir
        self.model: BusModel = BusModel() if model is None else model
        self.listeners = Listeners() if listeners is None else listeners
        self._guests: dict[str, Guest] = {}
        self._watchers: list[Callable[[Happening], object]] = []
        self._serving: dict[str, trio.CancelScope] = {}
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
        with self._own_runtime_dir():
            _raise_file_limit()
            async with trio.open_nursery() as self._device_nursery:
                unwatch = self.model.watch(self._changed)
                try:
                    async with trio.open_nursery() as self._guest_nursery:
                        await self._populate()
                        await self._guest_nursery.start(
                            ControlServer(self, self.control_path).serve
                        )
                        self.listeners.remove_unclaimed()
                        logger.info("ready in %s", self.runtime_dir)
                        task_status.started()
                        await self._stop.wait()
                        logger.info("stopping")
                        self._guest_nursery.cancel_scope.cancel()
                finally:
                    self._remove_devices()
                    unwatch()
                    self._device_nursery.cancel_scope.cancel()

    # What can be changed while it runs, beside the model

    def add_device(
        self,
        name: str,
        class_name: str,
        attributes: Mapping[str, object],
        buses: Sequence[str] = (),
    ) -> Device:
        """Make a device and put it on buses, all or nothing; raises as the model."""
        for bus in buses:
            self.model.bus(bus)
        device = self.model.add_device(name, class_name, attributes)
        try:
            for bus in buses:
                self.model.link(bus, name)
        except BaseException:
            self.model.remove_device(name)
            raise
        return device

    def remove_device(self, name: str) -> None:
        """Take a device off its buses and remove it; raises as the model."""
        self.model.remove_device(name)

    async def add_guest(self, config: GuestConfig) -> Guest:
        """Serve one more guest; its socket is there on return.

        Raises InvalidError, ExistsError, NotFoundError (no such bus), BusyError or
        OSError of the socket.
        """
        check_name(config.name)
        if config.name in self._guests:
            raise ExistsError(f"guest {config.name} exists")
        path = self._guests_dir / f"{config.name}.sock"
        if config.uid not in (None, os.geteuid()):
            self._let_others_through()
        guest = Guest(
            config,
            self.model.bus(config.bus),
            path,
            lambda event: self._tell({"event": event, "guest": config.name}),
            self.listeners,
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

    def watch(self, watcher: Callable[[Happening], object]) -> Callable[[], None]:
        """Call `watcher` with every change; what is returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    # Inside

    async def _populate(self) -> None:
        for bus in self.config.buses:
            with self._place(f"bus {bus.name}"):
                self.model.add_bus(bus.name)
        for device in self.config.devices:
            with self._place(f"device {device.name}"):
                self.add_device(
                    device.name, device.class_name, device.attributes, device.buses
                )
        for guest in self.config.guests:
            with self._place(f"guest {guest.name}"):
                await self.add_guest(guest)

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
            logger.exception("guest %s failed", guest.name)
            self.listeners.remove(guest.path)
            about = {"guest": guest.name, "message": str(innermost(error))}
            self._tell({"event": "guest-failed", **about})
        finally:
            del self._guests[guest.name]

    def _remove_devices(self) -> None:
        """Remove all devices, each before those it uses: the youngest first."""
        while left := list(self.model.devices):
            for name in reversed(left):
                try:
                    self.model.remove_device(name)
                except BusyError:
                    continue
                except Exception:
                    logger.exception("%s: removing it failed", name)
            if list(self.model.devices) == left:
                logger.error("not removed, they use each other: %s", ", ".join(left))
                return

    def _changed(self, change: Change) -> None:
        if change.kind is ChangeKind.DEVICE_ADDED:
            device = self.model.device(str(change.device))
            if device.overrides("serve"):
                self._device_nursery.start_soon(self._serve_device, device)
        elif change.kind is ChangeKind.DEVICE_REMOVED:
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
        """Run a device's own task; when it fails the device leaves its buses."""
        if self.model.devices.get(device.name) is not device:
            return  # removed before its task could start
        with trio.CancelScope() as scope:
            self._serving[device.name] = scope
            try:
                await device.serve()
            except Exception as error:
                logger.exception("device %s failed", device.name)
                self._tell(
                    {
                        "event": "device-failed",
                        "device": device.name,
                        "message": str(error),
                    }
                )
                for bus, _ in list(self.model.links(device)):
                    self.model.unlink(bus.name, device.name)

    def _tell(self, happening: Happening) -> None:
        for watcher in tuple(self._watchers):
            watcher(happening)

    @contextmanager
    def _own_runtime_dir(self) -> Iterator[None]:
        """Hold the directory: only one daemon at a time, whatever sockets lie there."""
        self.runtime_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._guests_dir.mkdir(mode=0o750, exist_ok=True)
        path = self.runtime_dir / "vbus.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another daemon runs in {self.runtime_dir}") from None
            yield
        finally:
            os.close(fd)

    @property
    def _guests_dir(self) -> Path:
        return self.runtime_dir / "guests"

    def _let_others_through(self) -> None:
        """Let a guest of another user reach its socket; nobody else can list them."""
        for path in (self.runtime_dir, self._guests_dir):
            path.chmod(path.stat().st_mode | stat.S_IXOTH)


def innermost(error: BaseException) -> BaseException:
    """Give the first exception that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _raise_file_limit() -> None:
    """Each open signal costs an eventfd: take all descriptors we may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
