"""The daemon's connection to one backend process: its messages, its health, its end.

Owns the socket, the pidfd, the bells that the backend rings to have a guest told, and
the mirrors of guests' memory. When it ends, for whatever reason, the process is dead
before anybody hears of it: so no byte of a guest's is touched any more.

A backend that breaks the protocol, or owes an answer longer than its deadline, is
killed. A guest's call that waits then fails with ETIMEDOUT if it hung, else with ENXIO.
"""

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from shm import Doorbell
from vbus.backend import record, wire
from vbus.backend.core import Answered, BackendCore
from vbus.backend.device import RemoteDevice, refusal
from vbus.backend.mirror import Mirror
from vbus.backend.process import Process
from vbus.connection import Connection, SharedMemory
from vbus.device import CallResult, Device
from vbus.errors import (
    CallTimeoutError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    ProtocolError,
    VbusError,
    class_of,
    innermost,
)
from vbus.memory import GuestMemory
from vbus.vfio_user.transport import FdSocket, close_all

log = logging.getLogger(__name__)

_RECEIVE_SIZE = 65536
_QUEUE_LIMIT = 16 << 20
_BEATS = 4
"""Pings in the time of a deadline."""

Done = Callable[[wire.Reply | None], object]
Keep = Callable[[str, int | None], object]


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters of one connection to a backend."""

    requests: int
    unanswered: int
    """Requests without a reply so far."""
    bells: int
    """Times that a backend had a guest told."""
    guests: int
    """Guests whose memory it has now."""
    connections: int


class _Gone(Exception):
    """The backend hung up."""


class _Hung(Exception):
    """The backend owes an answer for too long."""


class _Remote:
    """One connection of a guest to a device there.

    Of a transparent device it goes from one process to the next, with its record.
    """

    def __init__(self, number: int, mirror: "Mirror", cls: type[RemoteDevice]) -> None:
        self.number = number
        self.mirror = mirror
        self.bells: dict[int, Doorbell] = {}
        self.failed = trio.Event()
        self.reason = ""
        self.area = cls.record_area if cls.transparent else None
        self.record = -1 if self.area is None else record.create(self.area)
        self.turn = trio.Lock()
        """Calls of a transparent device come one after the other."""
        self.calls = 0

    @property
    def transparent(self) -> bool:
        return self.area is not None

    def close(self) -> None:
        """Let go of what is the daemon's; safe to repeat."""
        for bell in self.bells.values():
            bell.close()
        self.bells.clear()
        if self.record >= 0:
            os.close(self.record)
            self.record = -1


class BackendLink:
    """One connection to one backend process. `serve` it once."""

    def __init__(
        self,
        name: str,
        sock: FdSocket,
        process: Process,
        *,
        deadline_s: float,
        hello_s: float,
    ) -> None:
        self.name = name
        self.process = process
        self.ending = False
        self.ended = False
        self._hung = False
        self._socket = sock
        self._core = BackendCore(deadline_s)
        self._deadline_s = deadline_s
        self._hello_s = hello_s
        self._hello = trio.Event()
        self._waiting: dict[int, tuple[wire.Request, Done]] = {}
        self._calls = 0
        self._call_left = trio.lowlevel.ParkingLot()
        self._mirrors: dict[GuestMemory, Mirror] = {}
        self._remotes: dict[Connection, _Remote] = {}
        self._numbers: dict[int, _Remote] = {}
        self._last_number = 0
        self._requests = self._bells = 0
        self._device_failed: Callable[[str, str], object] = lambda *_: None
        self._keep: Keep
        self._fds: list[int] = []
        self._nursery: trio.Nursery

    async def serve(
        self,
        up: Callable[[wire.Hello], Awaitable[None]],
        device_failed: Callable[[str, str], object],
    ) -> str:
        """Serve until it ends, and say why; the process is dead then.

        `up` is awaited, in a task of its own, when the backend has said who it is;
        what VbusError it raises is told to the backend, which has to leave.
        """
        self._device_failed = device_failed
        orderly, reason = True, ""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._socket.run_sender)
                self._nursery.start_soon(self._watch_health)
                await self._receive(up)
        except* (_Gone, _Hung, ProtocolError) as group:
            cause = innermost(group)
            orderly = isinstance(cause, _Gone)
            self._hung = isinstance(cause, _Hung)
            reason = str(cause)
        except* Exception as group:
            log.error("%s: serving it failed", self.name, exc_info=group)
            orderly, reason = False, f"serving it failed: {innermost(group)!r}"
        finally:
            await self._end(orderly)
        return reason

    async def _end(self, orderly: bool) -> None:
        self.ending = True
        self._socket.close()
        close_all(self._fds)
        await self._fail_calls()
        if not await self.process.end(orderly=orderly):
            log.error("%s: process %d cannot be killed", self.name, self.process.pid)
        self.process.close()
        self.ended = True
        left = set(self._remotes.values())
        for remote in self._numbers.values():
            if not (remote.transparent and remote in left):
                remote.close()
        for mirror in self._mirrors.values():
            mirror.detach()
        waiting, self._waiting = self._waiting, {}
        for _, done in waiting.values():
            done(None)

    async def _fail_calls(self) -> None:
        """Let the calls under way fail before the guest hears that the device is gone.

        They hold nothing of the guest's; all else is answered by the process's end.
        """
        for id, (request, done) in tuple(self._waiting.items()):
            if isinstance(request, wire.Call):
                del self._waiting[id]
                done(None)
        with trio.CancelScope(shield=True):
            while self._calls:
                await self._call_left.park()

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(
            self._requests,
            self._core.unanswered,
            self._bells,
            len(self._mirrors),
            len(self._remotes),
        )

    # Messages

    async def _receive(self, up: Callable[[wire.Hello], Awaitable[None]]) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            size = max(_RECEIVE_SIZE, self._core.missing)
            received = self._socket.receive_nowait(size)
            if received is None:
                continue
            data, fds = received
            self._fds += fds
            if not data:
                raise _Gone("it hung up")
            for event in self._core.feed(data, len(fds)):
                if isinstance(event, wire.Hello):
                    self._hello.set()
                    self._nursery.start_soon(self._welcome, event, up)
                elif isinstance(event, Answered):
                    self._answered(event)
                elif isinstance(event, wire.Failed):
                    self._failed(event)
                elif isinstance(event, wire.Keep):
                    self._keep(event.device, self._fds.pop(0) if event.comes else None)
                else:
                    self._device_failed(event.device, event.message)

    async def _welcome(
        self, hello: wire.Hello, up: Callable[[wire.Hello], Awaitable[None]]
    ) -> None:
        try:
            await up(hello)
        except VbusError as error:
            self._socket.send(wire.encode(wire.Refused(str(error))))
            raise ProtocolError(str(error)) from error

    def welcome(self, welcome: wire.Welcome, keep: Keep) -> None:
        """Tell it that it may stay, and what it is called here.

        `keep` gets each descriptor that a device shall have in the next process.
        """
        self.name = welcome.name
        self._keep = keep
        self._socket.send(wire.encode(welcome))

    def _answered(self, event: Answered) -> None:
        _, done = self._waiting.pop(event.request.id)
        done(event.reply)

    def request(
        self,
        make: Callable[[int], wire.Request],
        done: Done,
        fds: Sequence[int] = (),
    ) -> int:
        """Ask; `done` gets the reply, or None when the backend is gone."""
        request = make(self._core.next_id())
        if self.ended:
            done(None)
            return request.id
        frame = self._core.request(request, trio.current_time(), len(fds))
        self._waiting[request.id] = (request, done)
        self._requests += 1
        if not self.ending:  # else it hears nothing any more; its end is the answer
            self._socket.send(frame, fds)
        return request.id

    async def ask(
        self, make: Callable[[int], wire.Request], fds: Sequence[int] = ()
    ) -> wire.Reply:
        """Ask and wait. Raises NoDeviceError or CallTimeoutError if it is gone.

        Cancelled, it tells the backend that nobody waits.
        """
        there = trio.Event()
        replies: list[wire.Reply | None] = []

        def done(reply: wire.Reply | None) -> None:
            replies.append(reply)
            there.set()

        id = self.request(make, done, fds)
        try:
            await there.wait()
        except trio.Cancelled:
            if not self.ending:
                self._socket.send(wire.encode(wire.Cancel(id)))
            raise
        if replies[0] is None:
            raise self.gone_error()
        return replies[0]

    def gone_error(self) -> VbusError:
        """What a request fails with when the backend is gone."""
        if self._hung:
            return CallTimeoutError(f"backend {self.name} does not answer")
        return NoDeviceError(f"backend {self.name} is gone")

    # Health

    async def _watch_health(self) -> None:
        with trio.move_on_after(self._hello_s):
            await self._hello.wait()
        if not self._hello.is_set():
            raise _Hung(f"no hello within {self._hello_s} s")
        while True:
            self.request(wire.Ping, lambda _: None)
            await trio.sleep(self._deadline_s / _BEATS)
            late = self._core.overdue(trio.current_time())
            if late is not None:
                what = type(late).__name__.lower()
                raise _Hung(f"no answer to {what} within {self._deadline_s} s")
            if self._socket.queued_bytes > _QUEUE_LIMIT:
                raise _Hung(f"it left {self._socket.queued_bytes} bytes unread")

    # What devices do

    async def open(self, connection: Connection) -> None:
        """Open there; the guest's memory goes along if this is the first."""
        if self.ending:
            raise self.gone_error()
        remote = self._new_remote(connection)
        try:
            reply = await self.ask(*self._opening(connection, remote))
        except BaseException:
            self.end(connection)
            raise
        if reply.result < 0:
            self.end(connection)
            raise _refused(reply, connection)

    def _opening(
        self, connection: Connection, remote: _Remote, *, resumes: bool = False
    ) -> tuple[Callable[[int], wire.Open], list[int]]:
        """Give what opens it there, and the descriptors."""
        number, guest = remote.number, remote.mirror.number
        fds = [remote.record] if remote.transparent else []
        name, version = connection.device.name, connection.version
        return (
            lambda id: wire.Open(id, number, guest, name, version, remote.area, resumes)
        ), fds

    def _new_remote(self, connection: Connection) -> _Remote:
        mirror, device = self._mirror(connection), connection.device
        assert isinstance(device, RemoteDevice)
        try:
            remote = _Remote(self._next_number(), mirror, type(device))
        except OSError as error:
            self._leave(mirror)
            raise NoSpaceError(f"no record: {error.strerror}") from None
        self._remotes[connection] = self._numbers[remote.number] = remote
        return remote

    def _mirror(self, connection: Connection) -> Mirror:
        """Give a guest's memory here, made with its first connection."""
        memory = connection.memory
        if not isinstance(memory, GuestMemory):
            raise InvalidError(f"{connection.guest}'s memory cannot be passed on")
        mirror = self._mirrors.get(memory)
        if mirror is None:
            mirror = Mirror(self, self._next_number(), connection.guest, memory)
            self._mirrors[memory] = mirror
        mirror.users += 1
        return mirror

    def _leave(self, mirror: Mirror) -> None:
        mirror.users -= 1
        if not mirror.users and not self.ended:
            del self._mirrors[mirror.memory]
            mirror.end()

    async def adopt(self, before: "BackendLink", device: Device) -> None:
        """Go on with the open connections that a device had in an ended process.

        One that cannot go on fails, alone. Cancelled or ended itself, it leaves them to
        the process after it.
        """
        async with trio.open_nursery() as nursery:
            for connection, remote in tuple(before._remotes.items()):
                if connection.device is device:
                    del before._remotes[connection]
                    remote.number = self._next_number()
                    remote.mirror = self._mirror(connection)
                    self._remotes[connection] = self._numbers[remote.number] = remote
                    nursery.start_soon(self._resume, connection, remote)

    async def _resume(self, connection: Connection, remote: _Remote) -> None:
        shared = tuple(connection.shm.values())
        number = remote.number
        open_request, fds = self._opening(connection, remote, resumes=True)
        refused: list[wire.Reply] = []

        def noted(reply: wire.Reply | None) -> None:
            if reply is not None and reply.result < 0:
                refused.append(reply)

        self.request(open_request, noted, fds)
        for shm in shared:
            bell = remote.bells.get(shm.id)
            if bell is not None:
                self._nursery.start_soon(self._watch_bell, bell, shm)
            share_request, fds = _sharing(remote, shm)
            self.request(share_request, noted, fds)
        try:
            noted(await self.ask(lambda id: wire.Resume(id, number)))
        except VbusError:
            return  # the next process goes on with it
        if refused:
            remote.reason = refused[0].message
            remote.failed.set()
            return
        for shm in shared:  # what the process before wanted to tell may be lost
            if shm.signal is not None:
                shm.notify()

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    async def share(self, connection: Connection, shm: SharedMemory) -> None:
        """Share there, with the guest's doorbell and a bell of ours."""
        remote = self._remote(connection)
        bell: Doorbell | None = None
        if shm.doorbell is not None:
            try:
                bell = remote.bells[shm.id] = Doorbell()
            except OSError as error:
                raise NoSpaceError(f"no bell: {error.strerror}") from None
            self._nursery.start_soon(self._watch_bell, bell, shm)
        try:
            reply = await self.ask(*_sharing(remote, shm))
            if reply.result < 0:
                raise _refused(reply, connection)
        except BaseException:
            if bell is not None and remote.bells.get(shm.id) is bell:
                del remote.bells[shm.id]
                bell.close()
            raise

    async def _watch_bell(self, bell: Doorbell, shm: SharedMemory) -> None:
        try:
            while True:
                await bell.wait()
                self._bells += 1
                shm.notify()
        except trio.ClosedResourceError:
            pass

    async def call(
        self, connection: Connection, function: int, data: bytes, flags: int
    ) -> CallResult:
        """Call there."""
        return await self._call(self._remote(connection).number, function, data, flags)

    async def _call(
        self, number: int, function: int, data: bytes, flags: int, call: int = 0
    ) -> CallResult:
        self._calls += 1
        try:
            reply = await self.ask(
                lambda id: wire.Call(id, number, function, data, flags, call)
            )
        finally:
            self._calls -= 1
            self._call_left.unpark_all()
        return reply.result, reply.data

    @asynccontextmanager
    async def turn(self, connection: Connection) -> AsyncIterator[int]:
        """Wait for the turn of a call of a transparent device; gives its number."""
        remote = self._remotes.get(connection)
        if remote is None:
            raise self.gone_error()
        async with remote.turn:
            remote.calls += 1
            yield remote.calls

    async def call_once(
        self, connection: Connection, function: int, data: bytes, flags: int, call: int
    ) -> CallResult:
        """Call there, with the number that the call has for every process."""
        number = self._remote(connection).number
        return await self._call(number, function, data, flags, call)

    async def close(self, connection: Connection) -> None:
        """Close there, when the device has let go; else at once, by `end`."""
        remote = self._remotes.get(connection)
        if remote is None:
            return
        try:
            await self.ask(lambda id: wire.Close(id, remote.number))
        finally:
            self.end(connection)

    def end(self, connection: Connection) -> None:
        """End it there, at once; the guest is told nothing before it is done."""
        remote = self._remotes.pop(connection, None)
        if remote is None:
            return
        remote.close()
        done = remote.mirror.memory.retracting()

        def ended(_: wire.Reply | None) -> None:
            self._numbers.pop(remote.number, None)
            done()

        self.request(lambda id: wire.End(id, remote.number), ended)
        self._leave(remote.mirror)

    async def retract(self, connections: Sequence[Connection]) -> None:
        """End connections there and wait: before the guest hears of it."""
        for connection in connections:
            remote = self._remotes.get(connection)
            if remote is not None:
                await self._end_number(remote.number)

    async def _end_number(self, number: int) -> None:
        await self.ask(lambda id: wire.End(id, number))

    async def failure(self, connection: Connection) -> None:
        """Wait until the backend ends this connection; raises what it gave then."""
        remote = self._remotes.get(connection)
        if remote is None:
            return
        await remote.failed.wait()
        raise ProtocolError(f"backend {self.name}: {remote.reason}")

    def _failed(self, event: wire.Failed) -> None:
        remote = self._numbers.get(event.connection)
        if remote is not None:
            remote.reason = event.message
            remote.failed.set()

    def _remote(self, connection: Connection) -> _Remote:
        remote = self._remotes.get(connection)
        if remote is None or self.ending:
            raise self.gone_error()
        return remote

    # What the manager does

    async def create(
        self,
        name: str,
        class_name: str,
        attributes: dict[str, Any],
        fds: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Make a device there, with what was kept for it; gives its attributes.

        Raises what it refuses with.
        """
        reply = await self.ask(
            lambda id: wire.Create(id, name, class_name, attributes), fds
        )
        return _values(reply, name)

    async def change(self, name: str, attribute: str, value: object) -> dict[str, Any]:
        """Set an attribute there; gives all of them."""
        reply = await self.ask(lambda id: wire.Change(id, name, attribute, value))
        return _values(reply, name)

    async def remove(self, name: str) -> None:
        """Remove a device there. Raises BusyError if another one uses it."""
        _values(await self.ask(lambda id: wire.Remove(id, name)), name)

    async def count(self) -> dict[str, Any]:
        """Give the statistics of all devices there."""
        return _values(await self.ask(wire.Count), self.name)


def _values(reply: wire.Reply, what: str) -> dict[str, Any]:
    error = refusal(reply, lambda: what)
    if error is not None:
        raise error
    return reply.values


def _refused(reply: wire.Reply, connection: Connection) -> VbusError:
    message = reply.message or f"{connection.device.name} refuses"
    return class_of(-reply.result)(message)


def _sharing(
    remote: _Remote, shm: SharedMemory
) -> tuple[Callable[[int], wire.Share], list[int]]:
    """Give what shares it there, and the descriptors."""
    number, fds = remote.number, []
    if shm.doorbell is not None:
        fds = [shm.doorbell.fileno(), remote.bells[shm.id].fileno()]
    return (
        lambda id: wire.Share(
            id,
            number,
            shm.id,
            shm.view.addr,
            shm.size,
            shm.flags,
            shm.signal_offset,
            shm.prio,
            shm.cookie,
        )
    ), fds
