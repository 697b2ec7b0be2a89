"""The backend's end of the protocol: it does what the daemon asks, with real devices.

Devices are made by a bus model of this process's own, so those that use each other have
to live together. What of a request has to wait for a device goes on in a task; all else
is answered in the order in which it came.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import outcome
import trio

from backends.process.confine import Confinement
from backends.process.guest import GuestSide
from shm import Doorbell
from vbus.asking import Result, Waiting
from vbus.attributes import REQUIRED
from vbus.backend import wire
from vbus.bus import BusModel
from vbus.control.show import plain
from vbus.device import Device
from vbus.errors import (
    CallTimeoutError,
    NotFoundError,
    ProtocolError,
    UnreachableError,
    VbusError,
)
from vbus.vfio_user.transport import FdSocket, close_all

log = logging.getLogger(__name__)

_RECEIVE_SIZE = 65536
_TEXT = 1024
_READER = wire.decoder(wire.FromDaemon)


class BackendHost:
    """Devices for one daemon, behind `sock`. `run` it once."""

    def __init__(
        self,
        name: str,
        model: BusModel,
        sock: FdSocket,
        devices: Sequence[wire.DeviceInfo],
        confinement: Confinement,
    ) -> None:
        self._confinement = confinement
        self._name = name
        self._model = model
        self._socket = sock
        self._devices = tuple(devices)
        self._frames = wire.Frames()
        self._fds: list[int] = []
        self._guests: dict[int, GuestSide] = {}
        self._owners: dict[int, GuestSide] = {}
        self._running: dict[int, trio.CancelScope] = {}
        self._serving: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery
        model.keep = self._keep
        self._does: dict[
            type[wire.Request], Callable[[Any, list[int]], _Later | wire.Reply | None]
        ] = {
            wire.Ping: lambda *_: None,
            wire.Create: self._create,
            wire.Remove: self._remove,
            wire.Change: self._change,
            wire.Count: self._count,
            wire.Map: self._map,
            wire.Unmap: self._unmap,
            wire.Forget: self._forget,
            wire.Open: self._open,
            wire.Resume: self._resume,
            wire.Share: self._share,
            wire.Call: self._call,
            wire.Close: self._close,
            wire.End: self._end,
        }

    async def run(self) -> None:
        """Serve until the daemon leaves: UnreachableError. ProtocolError if refused."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._socket.run_sender)
                self._say(self._hello())
                await self._receive()
        finally:
            for guest in self._guests.values():
                guest.shut_down()
            close_all(self._fds)
            self._remove_all()
            self._socket.close()

    def _hello(self) -> wire.Hello:
        classes = [
            class_info(name, self._model.device_class(name))
            for name in self._model.classes
        ]
        return wire.Hello(wire.VERSION, self._name, tuple(classes), self._devices)

    def _remove_all(self) -> None:
        for name in reversed(list(self._model.devices)):
            try:
                self._model.remove_device(name)
            except Exception:
                log.exception("%s: removing it failed", name)

    # Messages

    def _say(self, message: wire.Message) -> None:
        self._socket.send(wire.encode(message))

    async def _receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            size = max(_RECEIVE_SIZE, self._frames.missing)
            received = self._socket.receive_nowait(size)
            if received is None:
                continue
            data, fds = received
            self._fds += fds
            if not data:
                raise UnreachableError("the daemon left")
            for frame in self._frames.feed(data):
                taken, self._fds = self._fds[: frame.fds], self._fds[frame.fds :]
                try:
                    if len(taken) < frame.fds:
                        raise ProtocolError("a message lacks its descriptors")
                    self._take(wire.decode(frame.body, _READER), taken)
                finally:
                    close_all(taken)

    def _take(self, message: wire.FromDaemon, fds: list[int]) -> None:
        if isinstance(message, wire.Request):
            self._answer(message, fds)
        elif isinstance(message, wire.Cancel):
            scope = self._running.get(message.request)
            if scope is not None:
                scope.cancel()
        elif isinstance(message, wire.Refused):
            raise ProtocolError(f"the daemon refuses: {message.message}")
        else:
            self._confinement.enter(message, self._model)
            log.info("backend %s is up", message.name)

    def _answer(self, request: wire.Request, fds: list[int]) -> None:
        try:
            answer = self._does[type(request)](request, fds)
        except VbusError as error:
            self._reply(request, wire.Reply(0, -error.errno, message=_cut(error)))
        except Exception as error:
            log.exception("%s failed", type(request).__name__)
            code = -VbusError.errno
            self._reply(request, wire.Reply(0, code, message=_cut(repr(error))))
        else:
            if isinstance(answer, _Later):
                self._nursery.start_soon(self._answer_later, request, answer)
            else:
                self._reply(request, answer or wire.Reply(0))

    def _reply(self, request: wire.Request, reply: wire.Reply) -> None:
        try:
            self._say(msgspec.structs.replace(reply, id=request.id))
        except VbusError as error:  # what a device gave cannot be said
            code, message = -VbusError.errno, _cut(error)
            self._say(wire.Reply(request.id, code, message=message))

    async def _answer_later(self, request: wire.Request, later: "_Later") -> None:
        result: outcome.Outcome[object]
        with trio.CancelScope() as scope:
            self._running[request.id] = scope
            try:
                result = outcome.Value(await later.waiting.work())
            except Exception as error:
                result = outcome.Error(error)
            finally:
                del self._running[request.id]
        if scope.cancelled_caught:
            result = outcome.Error(CallTimeoutError("nobody waits for it any more"))
        self._reply(request, later.reply(later.waiting.finish(result)))

    # Devices

    def _create(self, said: wire.Create, fds: list[int]) -> wire.Reply:
        cls = self._model.device_class(said.class_name)
        self._confinement.check(cls, said.attributes)
        if fds:
            self._model.kept[said.device] = fds.pop()
        try:
            device = self._model.add_device(
                said.device, said.class_name, said.attributes
            )
        finally:
            left = self._model.kept.pop(said.device, None)
            if left is not None:
                os.close(left)
        if device.overrides("serve"):
            scope = self._serving[device.name] = trio.CancelScope()
            self._nursery.start_soon(self._serve, device, scope)
        return wire.Reply(0, values=_attributes(device))

    def _keep(self, name: str, fd: int | None) -> None:
        if fd is None:
            self._say(wire.Keep(name, comes=False))
        else:
            self._socket.send(wire.encode(wire.Keep(name), 1), [fd])

    async def _serve(self, device: Device, scope: trio.CancelScope) -> None:
        """Run a device's own task; when it fails its connections end."""
        with scope:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                await device.serve()
            except Exception as error:
                log.exception("device %s failed", device.name)
                self._drop(device)
                self._say(wire.DeviceFailed(device.name, _cut(error)))

    def _remove(self, said: wire.Remove, _fds: list[int]) -> None:
        device = self._model.device(said.device)
        if not self._model.users(device):
            self._drop(device)
        self._model.remove_device(said.device)
        scope = self._serving.pop(said.device, None)
        if scope is not None:
            scope.cancel()

    def _drop(self, device: Device) -> None:
        for guest in self._guests.values():
            guest.drop(device)

    def _change(self, said: wire.Change, _fds: list[int]) -> wire.Reply:
        self._model.set_attribute(said.device, said.attribute, said.value)
        return wire.Reply(0, values=_attributes(self._model.device(said.device)))

    def _count(self, _said: wire.Count, _fds: list[int]) -> wire.Reply:
        counted = {
            device.name: _statistics(device) for device in self._model.devices.values()
        }
        return wire.Reply(0, values=counted)

    # Guests

    def _map(self, said: wire.Map, fds: list[int]) -> None:
        guest = self._guests.get(said.guest)
        if guest is None:
            guest = GuestSide(said.guest_name, self._nursery, self._failed)
            self._guests[said.guest] = guest
        guest.map(said.ranges, fds)

    def _unmap(self, said: wire.Unmap, _fds: list[int]) -> None:
        guest = self._guests.get(said.guest)
        if guest is not None:
            guest.memory.unmap(said.address, said.size)

    def _forget(self, said: wire.Forget, _fds: list[int]) -> None:
        guest = self._guests.pop(said.guest, None)
        if guest is not None:
            guest.shut_down()
            self._owners = {
                number: owner
                for number, owner in self._owners.items()
                if owner is not guest
            }

    def _failed(self, connection: int, message: str) -> None:
        self._say(wire.Failed(connection, message[:_TEXT]))

    def _open(self, said: wire.Open, fds: list[int]) -> "_Later | wire.Reply":
        device = self._model.device(said.device)
        guest = self._guests.get(said.guest)
        if guest is None:
            raise NotFoundError(f"no guest {said.guest}")
        self._owners[said.connection] = guest
        return _answer(guest.open(said, device, fds[0] if fds else None))

    def _resume(self, said: wire.Resume, _fds: list[int]) -> "_Later | wire.Reply":
        return _answer(self._owner(said.connection).resume(said.connection))

    def _share(self, said: wire.Share, fds: list[int]) -> "_Later | wire.Reply":
        bells: list[Doorbell] = []
        try:
            while fds:
                bells.append(Doorbell.adopt(fds.pop(0)))
            return _answer(self._owner(said.connection).share(said, bells))
        except BaseException:
            for bell in bells:
                bell.close()
            raise

    def _call(self, said: wire.Call, _fds: list[int]) -> "_Later | wire.Reply":
        out: list[bytes] = []
        return _answer(self._owner(said.connection).call(said, out), out)

    def _close(self, said: wire.Close, _fds: list[int]) -> "_Later | wire.Reply":
        return _answer(self._owner(said.connection).close(said.connection))

    def _end(self, said: wire.End, _fds: list[int]) -> None:
        guest = self._owners.pop(said.connection, None)
        if guest is not None:
            guest.end(said.connection)

    def _owner(self, connection: int) -> GuestSide:
        try:
            return self._owners[connection]
        except KeyError:
            raise NotFoundError(f"no connection {connection}") from None


class _Later:
    """A reply that a device still works on; `out` is what it gives for the guest."""

    def __init__(self, waiting: Waiting, out: list[bytes]) -> None:
        self.waiting = waiting
        self._out = out

    def reply(self, code: int) -> wire.Reply:
        return wire.Reply(0, code, b"".join(map(bytes, self._out)))


def _answer(result: Result, out: list[bytes] | None = None) -> _Later | wire.Reply:
    out = [] if out is None else out
    if isinstance(result, Waiting):
        return _Later(result, out)
    return wire.Reply(0, result, b"".join(map(bytes, out)))


def class_info(name: str, cls: type[Device]) -> wire.ClassInfo:
    """Describe a class as the daemon shows it."""
    attributes = tuple(
        wire.AttributeInfo(
            item.name,
            None if item.default is REQUIRED else plain(item.default),
            item.required,
            item.writable,
            item.doc[:_TEXT],
        )
        for item in cls.attributes.values()
    )
    return wire.ClassInfo(
        name,
        cls.type,
        cls.version,
        cls.max_connections,
        cls.transparent,
        cls.area_size,
        (cls.__doc__ or "").partition("\n")[0][:_TEXT],
        attributes,
    )


def _attributes(device: Device) -> dict[str, object]:
    return {name: plain(device.get_attribute(name)) for name in device.attributes}


def _statistics(device: Device) -> object:
    try:
        return plain(device.statistics())
    except Exception as error:  # a device's bug must not hide all others' counters
        log.exception("%s: statistics failed", device.name)
        return {"error": repr(error)}


def _cut(error: object) -> str:
    return str(error)[:_TEXT]
