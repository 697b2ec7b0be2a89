"""A device whose backend is another process, as the daemon's bus sees it.

Its hooks ask the backend and wait; what the guest shares goes there as descriptors, and
no byte of a ring passes here. It lives as long as that process: the one after it gets
new ones.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vbus.attributes import REQUIRED, Attribute
from vbus.backend import wire
from vbus.bus import check_name, check_type
from vbus.connection import Connection, Ended, SharedMemory
from vbus.device import CallResult, Device
from vbus.errors import ProtocolError, VbusError, class_of

if TYPE_CHECKING:
    from vbus.backend.link import BackendLink

_FIELDS = frozenset({"name", "host", "connections"})


class RemoteDevice(Device):
    """The base of the classes that `remote_class` makes."""

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


def remote_class(link: "BackendLink", info: wire.ClassInfo) -> type[RemoteDevice]:
    """Make the class of a backend's devices. Raises ProtocolError for what is none."""
    members: dict[str, Any] = {
        "__doc__": info.summary,
        "__module__": __name__,
        "type": info.type,
        "version": info.version,
        "max_connections": info.max_connections,
        "_link": link,
    }
    for item in info.attributes:
        if item.name in _FIELDS or hasattr(RemoteDevice, item.name):
            raise ProtocolError(f"{info.name}: an attribute named {item.name!r}")
        members[item.name] = Attribute(
            _as_it_is,
            REQUIRED if item.required else item.default,
            item.writable,
            True,
            item.doc,
        )
    cls: type[RemoteDevice] = type(f"Remote[{info.name}]", (RemoteDevice,), members)
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
