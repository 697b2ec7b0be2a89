"""What the author of a device writes: a subclass of Device.

    class Echo(Device):
        type = "org.vbus.echo"

        @call(0)
        def echo(self, connection: Connection, data: bytes) -> bytes:
            return data

    if __name__ == "__main__":
        main(Echo)

Class attributes describe the device, `@call(n)` marks the handlers of its functions.
Every hook may be a plain or an async function. A refusal is a VbusError: the guest
gets its errno. Any other exception is a bug of the device: the guest gets -EIO and the
log the traceback; it never reaches another device or guest.

A device must not assume that it runs in the daemon's process: it sees a guest only as
Connection and SharedMemory, and its host only as `self.host`.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from vbus.attributes import Attribute, attribute, attributes_of
from vbus.connection import Connection, Ended, SharedMemory
from vbus.errors import BusyError, InvalidError, PermissionDeniedError
from vbus.isolation.reach import Reach
from vbus.meter import Meter
from vbus.pci.function import PciFunction

logger = logging.getLogger(__name__)

CallResult = bytes | int | tuple[int, bytes] | None
"""Data for the guest's buffer, a result (>= 0 or -errno), both, or just success."""

Handler = TypeVar("Handler", bound=Callable[..., CallResult | Awaitable[CallResult]])


class Host(Protocol):
    """What a device can ask of the host it runs on."""

    def device(self, name: str) -> "Device":
        """Look up another device, which then cannot be removed before this one.

        Raises NotFoundError.
        """
        ...

    def keep(self, fd: int | None) -> None:
        """Have a copy of a descriptor outlive this process, if somebody can.

        One for each device, the last; of a transparent device in a backend of the
        daemon's. None: there is none any more.
        """
        ...

    def kept(self) -> int | None:
        """Take the descriptor that a process before this one kept for the device."""
        ...


def call(func: int) -> Callable[[Handler], Handler]:
    """Mark the method that answers DEVCALL number `func`.

    It is called with (connection, data), or (connection, data, flags) if it takes
    three arguments, and returns a CallResult.
    """

    def mark(handler: Handler) -> Handler:
        handler.__dict__["vbus_call"] = func
        return handler

    return mark


class Device:
    """A device on the bus. Subclass it; every hook below has a useful default."""

    type: ClassVar[str] = ""
    """Interface type string; "" is a device without an interface (it has no link)."""
    version: ClassVar[int] = 1
    """The ABI version a guest's driver must ask for."""
    max_connections: ClassVar[int] = 1
    """Open connections at a time, over all guests; the next is refused (-EBUSY)."""
    transparent: ClassVar[bool] = False
    """In a backend of the daemon's: after its process ended, the next one goes on with
    the open connections by `resume`, and the guest notices nothing."""
    area_size: ClassVar[int] = 0
    """Bytes of `Connection.area` for a transparent device."""

    attributes: ClassVar[dict[str, Attribute[Any]]] = {}
    calls: ClassVar[dict[int, tuple[str, bool]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.attributes = {item.name: item for item in attributes_of(cls)}
        cls.calls = dict(cls.calls)
        for name, method in vars(cls).items():
            func = getattr(method, "vbus_call", None)
            if func is not None:
                with_flags = method.__code__.co_argcount > 3
                cls.calls[func] = (name, with_flags)

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        """Take the attributes of the configuration. Raises InvalidError."""
        self.name = name
        self.host = host
        self.connections: set[Connection] = set()
        self.meter = Meter()
        unknown = attributes.keys() - self.attributes.keys()
        if unknown:
            raise InvalidError(
                f"{name}: {type(self).__name__} has no attribute {min(unknown)!r}"
            )
        for declared in self.attributes.values():
            if declared.name in attributes:
                value = declared.parse(attributes[declared.name])
                self.__dict__[declared.name] = value
            elif declared.required:
                raise InvalidError(f"{name}: attribute {declared.name!r} is missing")

    # Hooks of the device's life

    def setup(self) -> None:
        """Get ready: the attributes are set, others are at `self.host.device()`.

        A VbusError raised here refuses the device.
        """

    async def serve(self) -> None:
        """Run for as long as the device exists; cancelled when it is removed.

        Overridden only by a device that has work of its own: no task is made
        otherwise.
        """

    def teardown(self) -> None:
        """Undo `setup`: the device is removed, its connections are closed."""

    def attribute_changed(self, name: str) -> None:
        """React to a new value of a writable attribute; VbusError: keep the old."""

    @classmethod
    def reach(cls, values: Mapping[str, Any]) -> Reach:
        """Say which files a device opens by itself, for a backend that is isolated.

        `values` are its attributes as far as they are known; none at all stands for
        a device that comes later. Called before the process gives up all else: what
        `setup` would have to make must be made here.
        """
        return Reach()

    def statistics(self) -> object:
        """Give a frozen dataclass of counters, or a dict."""
        return {}

    def pci_function(self, layout: str, *, spin_us: float = 0) -> PciFunction:
        """Show the device as a PCI function of its own, in a register layout.

        `spin_us` is how long it may look for work before it sleeps. Whoever asked for
        the function closes it, before `teardown`. Raises InvalidError.
        """
        raise InvalidError(f"{self.name} can be shown on a bus only")

    # Hooks of a connection; plain or async

    def open(self, connection: Connection) -> Awaitable[None] | None:
        """Accept a connection, or raise a VbusError."""
        return None

    def close(self, connection: Connection) -> Awaitable[None] | None:
        """Let go of a connection that was opened; it takes no more calls.

        `run` is cancelled already. After DEVCLOSE the shared memory lives until this
        returns. When the guest or its memory is gone (reset, unlink, failure) it
        still lives during a plain close, but not during an async one.
        """
        return None

    def share(
        self, connection: Connection, shm: SharedMemory
    ) -> Awaitable[None] | None:
        """Accept memory the guest shares under `shm.id`, or raise a VbusError."""
        return None

    def save(self, connection: Connection) -> bytes:
        """Give what `resume` will need, in at most 32 KiB.

        Asked when the daemon is replaced; of a transparent device in a backend after
        `open` and after each call, before the guest has the answer: calls of one
        connection come one after the other. For what changes at other times the
        device calls `connection.save()`.
        """
        return b""

    def resume(
        self, connection: Connection, state: bytes, shared: Sequence[SharedMemory]
    ) -> Awaitable[None] | None:
        """Go on with a connection of a process that ended, in place of `open`.

        `shared` is what the guest shares, in the order in which it did; `state` what
        `save` gave last, and `connection.area` as it was left, both as hostile as all
        that another process wrote. A VbusError ends the connection, and when the daemon
        was replaced so does a hook that is async.
        """
        raise InvalidError(f"{self.name} cannot resume a connection")

    def call(
        self, connection: Connection, func: int, data: bytes, flags: int
    ) -> CallResult | Awaitable[CallResult]:
        """Answer DEVCALL. The default goes to the `@call(func)` method.

        `data` is a copy of the guest's buffer; what comes back must fit into it.
        """
        found = self.calls.get(func)
        if found is None:
            raise InvalidError(f"{self.name}: no function {func}")
        name, with_flags = found
        handler: Callable[..., CallResult | Awaitable[CallResult]]
        handler = getattr(self, name)
        if with_flags:
            return handler(connection, data, flags)
        return handler(connection, data)

    async def run(self, connection: Connection) -> None:
        """Serve one connection; cancelled before it is closed.

        Returning is fine and leaves the connection open; an exception ends it.
        """

    @classmethod
    def resumable(cls) -> bool:
        """Can its connections outlive this process?"""
        return cls.overrides("save") and cls.overrides("resume")

    # For the bus

    def get_attribute(self, name: str) -> object:
        """Give an attribute's value. Raises InvalidError for an unknown name."""
        return getattr(self, self._declared(name).name)

    def set_attribute(self, name: str, value: object) -> None:
        """Set one writable attribute from outside; raises as `set_attributes`."""
        self.set_attributes({name: value})

    def set_attributes(self, values: Mapping[str, object]) -> None:
        """Set writable attributes from outside, all of them or none.

        Raises InvalidError, PermissionDeniedError, BusyError, or what
        `attribute_changed` raises, with the old values back in place: it is called
        once more for each that was changed already.
        """
        parsed = {name: self._settable(name).parse(values[name]) for name in values}
        before = {name: getattr(self, name) for name in values}
        done: list[str] = []
        try:
            for name, value in parsed.items():
                self.__dict__[name] = value
                self.attribute_changed(name)
                done.append(name)
        except BaseException:
            self.__dict__.update(before)
            for name in reversed(done):
                self._changed_back(name)
            raise

    def _settable(self, name: str) -> Attribute[Any]:
        declared = self._declared(name)
        if not declared.writable:
            raise PermissionDeniedError(f"{self.name}: {name} cannot be changed")
        if self.connections and not declared.writable_while_open:
            raise BusyError(f"{self.name}: {name} cannot be changed while open")
        return declared

    def _changed_back(self, name: str) -> None:
        try:
            self.attribute_changed(name)
        except Exception:  # the refusal that led here is what the caller wants to know
            logger.exception("%s: %s could not be changed back", self.name, name)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Does this class implement `hook` (a method's name) itself?"""
        return getattr(cls, hook) is not getattr(Device, hook)

    def _declared(self, name: str) -> Attribute[Any]:
        try:
            return self.attributes[name]
        except KeyError:
            raise InvalidError(f"{self.name}: no attribute {name!r}") from None


def main(device_class: type[Device]) -> None:
    """Run a daemon with this device alone, for one guest, until interrupted.

    The command line gives attributes as NAME=VALUE.
    """
    from vbus.standalone import run

    run(device_class)


__all__ = [
    "CallResult",
    "Connection",
    "Device",
    "Ended",
    "Host",
    "Reach",
    "SharedMemory",
    "attribute",
    "call",
    "main",
]
