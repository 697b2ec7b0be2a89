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
from vbus.backend.record import Record
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

    device: Device
    version: int
    record: Record | None = None
    connection: Connection | None = None
    bells: list[Doorbell] = field(default_factory=list)
    resuming: list[SharedMemory] | None = None
    """What was shared with one that is to be resumed."""

    def answered(self, call: int, result: int, data: bytes) -> None:
        """Note the answer of a call, before the daemon has it."""
        if self.record is not None and self.connection is not None and call:
            state = self.device.save(self.connection)
            self.record.answered(call, result, data, state)

    def prepare(self, connection: Connection) -> None:
        """Give a connection what of it outlives this process."""
        record = self.record
        if record is not None:
            connection.area = record.area
            connection.save = lambda: record.save(self.device.save(connection))

    def close(self) -> None:
        """Let go of what it was given, but for what the client has."""
        for bell in self.bells:
            bell.close()
        self.bells.clear()
        for shm in self.resuming or ():
            shm.release()
        self.resuming = None
        if self.record is not None:
            self.record.close()


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

    def open(self, said: wire.Open, device: Device, fd: int | None) -> Result:
        """Open a device; `fd` is the connection's record."""
        number = said.connection
        opened = self._opened[number] = _Opened(device, said.version)
        if fd is not None:
            opened.record = Record(fd, said.area or 0, fresh=not said.resumes)
        if said.resumes:
            opened.resuming = []
            return 0

        def tell(connection: Connection) -> None:
            if self._opened.get(number) is not opened:
                raise NotFoundError(f"{connection}: ended while it was opened")
            opened.connection = connection
            connection.save()

        return self._client.open(_interface(device), said.version, tell, opened.prepare)

    def resume(self, number: int) -> Result:
        """Go on with a connection whose memories were shared again."""
        opened = self._opened.get(number)
        if opened is None or opened.resuming is None or opened.record is None:
            raise NotFoundError(f"{self._name} has no connection {number} to resume")
        shared, opened.resuming = opened.resuming, None

        def prepare(connection: Connection) -> None:
            opened.connection = connection
            opened.prepare(connection)

        return self._client.go_on(
            _interface(opened.device),
            opened.version,
            shared,
            opened.record.state,
            prepare,
        )

    def share(self, said: wire.Share, bells: Sequence[Doorbell]) -> Result:
        """Share memory; `bells` are the guest's doorbell and the daemon's bell."""
        opened = self._opened.get(said.connection)
        if opened is not None and opened.resuming is not None:
            doorbell, bell = bells if bells else (None, None)
            opened.resuming.append(self._make_shared(said, doorbell, bell))
            if bell is not None:
                opened.bells.append(bell)
            return 0
        opened, connection = self._find(said.connection)
        doorbell, bell = bells if bells else (None, None)

        def make(_post: Callable[[], object]) -> SharedMemory:
            return self._make_shared(said, doorbell, bell)

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

    def _make_shared(
        self, said: wire.Share, doorbell: Doorbell | None, bell: Doorbell | None
    ) -> SharedMemory:
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

    def call(self, said: wire.Call, out: list[bytes]) -> Result:
        """Call a device; what it gives for the guest goes into `out`."""
        opened, connection = self._find(said.connection)
        if opened.record is not None:
            known = opened.record.answer(said.number)
            if known is not None:
                out.append(known[1])
                return known[0]

        def answered(result: int) -> int:
            try:
                opened.answered(said.number, result, b"".join(out))
            except Exception as error:  # it could not be resumed from an old state
                self._connection_failed(connection, error)
            return result

        result = self._client.call(
            connection.handle, said.function, said.data, said.flags, out.append
        )
        if isinstance(result, int):
            return answered(result)
        finish = result.finish
        return Waiting(result.work, lambda answer: answered(finish(answer)))

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
        opened.close()

    def drop(self, device: Device) -> None:
        """A device goes: its connections end."""
        self._client.drop(_interface(device))

    def shut_down(self) -> None:
        """The guest is gone: end all, unmap all."""
        self._client.shutdown()
        self.memory.clear()
        for opened in self._opened.values():
            opened.close()
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


def _interface(device: Device) -> Interface:
    return Interface(0, device.type, device.name, device)
