"""One guest as a backend process sees it: its memory, and what it has open here.

The life of connections is the bus's own (`BusClient`), so that a device meets the same
here as in the daemon. What is missing are the events: a bell tells the daemon.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from shm import AddressSpace, Doorbell
from vbus.asking import Result, Waiting
from vbus.backend import wire
from vbus.bus import Interface
from vbus.client import BusClient, ClientCounters
from vbus.connection import Connection, Ended, SharedMemory, State
from vbus.device import Device
from vbus.errors import NotFoundError, VbusError
from vbus.events import Event
from vbus.tasks import BridgeTasks

log = logging.getLogger(__name__)

CLOSE_S = 60.0
Failed = Callable[[int, str], object]


class _NoEvents:
    """The daemon tells the guest what there is to tell."""

    waiting = 0

    def post(self, *events: Event) -> None:
        pass

    def close(self, event: Event, cookie: int) -> None:
        pass


@dataclass(slots=True)
class _Opened:
    """A connection by the daemon's number; `bells` are what it may ring."""

    connection: Connection | None = None
    bells: list[Doorbell] = field(default_factory=list)


class GuestSide:
    """A guest's memory and its connections."""

    def __init__(self, name: str, nursery: trio.Nursery, failed: Failed) -> None:
        """`failed` gets the number of a connection that ended here, and why."""
        self.memory = AddressSpace()
        self._name = name
        self._failed = failed
        self._opened: dict[int, _Opened] = {}
        tasks = BridgeTasks(nursery)
        tasks.failed = self._connection_failed
        self._client = BusClient(
            name, self.memory, _NoEvents(), tasks, ClientCounters(), timeout_s=CLOSE_S
        )

    def map(self, ranges: Sequence[wire.Range], fds: Sequence[int]) -> None:
        """Map; the descriptors stay the caller's. Raises what AddressSpace does."""
        for range, fd in zip(ranges, fds, strict=True):
            self.memory.map(
                range.address,
                range.size,
                fd,
                range.offset,
                writable=range.writable,
                allow_truncatable=range.truncatable,
            )

    def open(self, number: int, device: Device, version: int) -> Result:
        """Open a device for connection `number`."""
        opened = self._opened[number] = _Opened()

        def tell(connection: Connection) -> None:
            if self._opened.get(number) is not opened:
                raise NotFoundError(f"{connection}: ended while it was opened")
            opened.connection = connection

        interface = Interface(0, device.type, device.name, device)
        return self._client.open(interface, version, tell)

    def share(self, said: wire.Share, bells: Sequence[Doorbell]) -> Result:
        """Share memory; `bells` are the guest's doorbell and the daemon's bell."""
        opened, connection = self._find(said.connection)
        doorbell, bell = bells if bells else (None, None)

        def make(_post: Callable[[], object]) -> SharedMemory:
            view = self.memory.view(said.address, said.size)
            try:
                return SharedMemory(
                    said.shm,
                    view,
                    self.memory,
                    flags=said.flags,
                    signal_offset=said.signal_offset,
                    prio=said.priority,
                    cookie=said.cookie,
                    post=bell.ring if bell is not None else lambda: None,
                    doorbell=doorbell,
                )
            except BaseException:
                view.close()
                raise

        signal = None if said.signal_offset is None else (said.priority, said.cookie)
        if bell is not None:
            opened.bells.append(bell)

        def settled(code: int) -> int:
            if code < 0 and bell in opened.bells:
                opened.bells.remove(bell)
                bell.close()
            return code

        try:
            handle = connection.handle
            result = self._client.share(handle, said.shm, make, signal)
        except BaseException:
            settled(-1)
            raise
        if isinstance(result, int):
            return settled(result)
        finish = result.finish
        return Waiting(result.work, lambda answer: settled(finish(answer)))

    def call(self, said: wire.Call, reply: Callable[[bytes], None]) -> Result:
        """Call a device."""
        _, connection = self._find(said.connection)
        return self._client.call(
            connection.handle, said.function, said.data, said.flags, reply
        )

    def close(self, number: int) -> Result:
        """Close as the guest does: the memory goes when the device let go of it."""
        _, connection = self._find(number)
        return self._client.close(connection.handle)

    def end(self, number: int) -> None:
        """End at once, whatever state it is in; nothing if it is gone."""
        opened = self._opened.pop(number, None)
        if opened is None:
            return
        connection = opened.connection
        if connection is not None:
            if connection.state is State.OPEN:
                self._client.end(connection, Ended.UNLINKED)
            self._client.release(connection)
        _close_bells(opened)

    def drop(self, device: Device) -> None:
        """A device goes: its connections end."""
        self._client.drop(Interface(0, device.type, device.name, device))

    def shut_down(self) -> None:
        """The guest is gone: end all, unmap all."""
        self._client.shutdown()
        self.memory.clear()
        for opened in self._opened.values():
            _close_bells(opened)
        self._opened.clear()

    def _find(self, number: int) -> tuple[_Opened, Connection]:
        opened = self._opened.get(number)
        if opened is None or opened.connection is None:
            raise NotFoundError(f"{self._name} has no connection {number}")
        return opened, opened.connection

    def _connection_failed(self, connection: Connection, error: Exception) -> None:
        """A connection's task ended with an error: it alone ends."""
        if connection.state is not State.OPEN:
            return
        if not isinstance(error, VbusError):
            log.error("%r failed", connection, exc_info=error)
        self._client.end(connection, Ended.FAILED)
        for number, opened in self._opened.items():
            if opened.connection is connection:
                self._failed(number, str(error))


def _close_bells(opened: _Opened) -> None:
    for bell in opened.bells:
        bell.close()
    opened.bells.clear()
