"""A device whose backend is another process, as the daemon's bus sees it.

Its hooks ask the backend and wait; what the guest shares goes there as descriptors, and
no byte of a ring passes here. It lives as long as that process, and the one after it
gets a new one; a transparent device goes from one process to the next.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import trio

from vbus.attributes import REQUIRED, Attribute
from vbus.backend import wire
from vbus.bus import check_name, check_type
from vbus.connection import Connection, Ended, SharedMemory
from vbus.device import CallResult, Device
from vbus.errors import ProtocolError, VbusError, class_of

if TYPE_CHECKING:
    from vbus.backend.link import BackendLink

T = TypeVar("T")
_FIELDS = frozenset({"name", "host", "connections"})


class RemoteDevice(Device):
    """The base of the classes that `remote_class` makes."""

    record_area: ClassVar[int] = 0
    """The device's own `area_size`, there."""
    _link: ClassVar["BackendLink"]
    _counters: Mapping[str, object] = {}

    def open(self, connection: Connection) -> Awaitable[None]:
        return self._link.open(connection)

    def share(self, connection: Connection, shm: SharedMemory) -> Awaitable[None]:
        return self._link.share(connection, shm)

    def call(
        self, connection: Connection, func: int, data: bytes, flags: int
    ) -> Awaitable[CallResult]:
        return self._link.call(connection, func, data, flags)

    def close(self, connection: Connection) -> Awaitable[None] | None:
        if connection.ended is Ended.CLOSED:
            return self._link.close(connection)
        self._link.end(connection)
        return None

    async def run(self, connection: Connection) -> None:
        """Wait until the backend says that it failed; raises then."""
        await self._link.failure(connection)

    def statistics(self) -> object:
        """As they were when `BackendLink.count` was last asked."""
        return self._counters


class TransparentDevice(RemoteDevice):
    """One that stays when its process ends, and goes on with the next.

    What is asked meanwhile waits for that, as long as the guest does.
    """

    transparent = True

    _ready = True
    _changed: trio.Event
    _given_up = False

    def setup(self) -> None:
        self._changed = trio.Event()

    @property
    def link(self) -> "BackendLink":
        """The process it was with last."""
        return self._link

    def move(self, cls: type["TransparentDevice"]) -> None:
        """Belong to another process, which has this class for it."""
        self.__class__ = cls
        self._ready = False

    def goes_on(self) -> None:
        """Its connections are there again."""
        self._ready = True
        self._change()

    def give_up(self) -> None:
        """There will be no other process."""
        self._given_up = True
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _ask(
        self, what: Callable[["BackendLink"], Awaitable[T]], link: "BackendLink"
    ) -> T:
        """Ask the process that is there, and the next if it ends under it."""
        while True:
            while link.ending or not self._ready:
                if self._given_up:
                    raise link.gone_error()
                await self._changed.wait()
                link = self._link
            try:
                return await what(link)
            except VbusError:
                if not link.ending:
                    raise

    def open(self, connection: Connection) -> Awaitable[None]:
        return self._ask(lambda link: link.open(connection), self._link)

    def share(self, connection: Connection, shm: SharedMemory) -> Awaitable[None]:
        return self._ask(lambda link: link.share(connection, shm), self._link)

    async def call(
        self, connection: Connection, func: int, data: bytes, flags: int
    ) -> CallResult:
        async with self._link.turn(connection) as number:
            return await self._ask(
                lambda link: link.call_once(connection, func, data, flags, number),
                self._link,
            )

    async def _close(self, connection: Connection, link: "BackendLink") -> None:
        try:
            await link.close(connection)
        except VbusError:
            if not link.ending:  # else nobody has anything of it any more
                raise

    def close(self, connection: Connection) -> Awaitable[None] | None:
        if connection.ended is Ended.CLOSED:
            return self._close(connection, self._link)
        return super().close(connection)


def remote_class(
    link: "BackendLink", info: wire.ClassInfo, *, stays: bool = False
) -> type[RemoteDevice]:
    """Make the class of a backend's devices. Raises ProtocolError for what is none.

    `stays`: a transparent one outlives its process.
    """
    base = TransparentDevice if info.transparent and stays else RemoteDevice
    members: dict[str, Any] = {
        "__doc__": info.summary,
        "__module__": __name__,
        "type": info.type,
        "version": info.version,
        "max_connections": info.max_connections,
        "record_area": info.area_size,
        "_link": link,
    }
    for item in info.attributes:
        if item.name in _FIELDS or hasattr(TransparentDevice, item.name):
            raise ProtocolError(f"{info.name}: an attribute named {item.name!r}")
        members[item.name] = Attribute(
            _as_it_is,
            REQUIRED if item.required else item.default,
            item.writable,
            True,
            item.doc,
        )
    cls: type[RemoteDevice] = type(f"Remote[{info.name}]", (base,), members)
    try:
        check_name(info.name)
        check_type(cls)
    except VbusError as error:
        raise ProtocolError(str(error)) from None
    return cls


def _as_it_is(value: object) -> object:
    """The backend has checked it."""
    return value


def refusal(reply: wire.Reply, what: Callable[[], str]) -> VbusError | None:
    """Give the error that a reply stands for."""
    if reply.result >= 0:
        return None
    return class_of(-reply.result)(reply.message or f"{what()}: refused")
