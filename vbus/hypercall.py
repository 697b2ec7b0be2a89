"""Hypercalls: from a structure in guest memory to an operation of the session.

Each structure is read once as a whole. Where the ABI copies it back, that it can be
written is known before anything happens, so that a call which fails had no effect.
"""

from collections.abc import Callable
from typing import NamedTuple

from shm import AddressSpace
from vbus import abi
from vbus.abi import CAP_NAMES, Hypercall
from vbus.asking import Result
from vbus.bus import Bus, Interface
from vbus.client import BusClient
from vbus.connection import Connection, SharedMemory
from vbus.errors import InvalidError, NotFoundError, VbusError

DATA_LIMIT = 1 << 20
SIGNAL_SIZE = 16
_HANDLE = abi.DEVCLOSE


class _Call(NamedTuple):
    size: int
    run: Callable[[bytes, int], Result]


class Hypercalls:
    """The hypercalls of one session."""

    def __init__(
        self, client: BusClient, bus: Bus, memory: AddressSpace, capabilities: int
    ) -> None:
        self._client = client
        self._bus = bus
        self._memory = memory
        self._calls = {
            Hypercall.DEVOPEN: _Call(abi.DEVOPEN.size, self._devopen),
            Hypercall.DEVCLOSE: _Call(abi.DEVCLOSE.size, self._devclose),
            Hypercall.DEVCALL: _Call(abi.DEVCALL.size, self._devcall),
            Hypercall.DEVSHM: _Call(abi.DEVSHM.size, self._devshm),
        }
        if capabilities & CAP_NAMES:
            self._calls[Hypercall.DEVOPEN_NAME] = _Call(
                abi.DEVOPEN_NAME.size, self._devopen_name
            )

    def run(self, vector: int, length: int, gpa: int) -> Result:
        """Run the hypercall whose structure of `length` bytes lies at `gpa`."""
        call = self._calls.get(vector)  # type: ignore[call-overload]
        if call is None or length != call.size:
            return -InvalidError.errno
        try:
            result: Result = call.run(self._memory.read(gpa, length), gpa)
        except VbusError as error:
            return -error.errno
        return result

    def _devopen(self, argument: bytes, gpa: int) -> Result:
        call = abi.DEVOPEN.unpack(argument)
        self._memory.write(gpa, argument)

        def tell(connection: Connection) -> None:
            self._memory.write(
                gpa + 8, _HANDLE.pack(abi.DeviceClose(connection.handle))
            )

        return self._client.open(self._bus.interface(call.devid), call.version, tell)

    def _devopen_name(self, argument: bytes, gpa: int) -> Result:
        call = abi.DEVOPEN_NAME.unpack(argument)
        interface = self._find(call.name)
        self._memory.write(gpa, argument)

        def tell(connection: Connection) -> None:
            answer = call._replace(devid=interface.id, handle=connection.handle)
            self._memory.write(gpa, abi.DEVOPEN_NAME.pack(answer))

        return self._client.open(interface, call.version, tell)

    def _find(self, field: bytes) -> Interface:
        name = field.rstrip(b"\0")
        try:
            return self._bus.find(name.decode("ascii"))
        except UnicodeDecodeError:
            raise NotFoundError(f"no device {name!r}") from None

    def _devclose(self, argument: bytes, gpa: int) -> Result:
        return self._client.close(_HANDLE.unpack(argument).handle)

    def _devcall(self, argument: bytes, gpa: int) -> Result:
        call = abi.DEVCALL.unpack(argument)
        self._client.connection(call.handle)  # before anything else (R3)
        if call.len > DATA_LIMIT:
            raise InvalidError(f"{call.len} bytes of data are more than {DATA_LIMIT}")
        # Without data the pointer means nothing, so it is never looked at (ABI 12.2).
        data = self._memory.read(call.datap, call.len) if call.len else b""

        def reply(out: bytes) -> None:
            if len(out) > call.len:
                raise InvalidError(f"{len(out)} bytes do not fit into {call.len}")
            if self._client.alive:
                self._memory.write(call.datap, out)

        return self._client.call(call.handle, call.func, data, call.flags, reply)

    def _devshm(self, argument: bytes, gpa: int) -> Result:
        call = abi.DEVSHM.unpack(argument)
        self._client.connection(call.handle)
        if call.len == 0 or call.datap + call.len > 1 << 64:
            raise InvalidError(f"{call.len} bytes at {call.datap:#x} are no memory")
        with_signal = call.signal_offset != abi.NO_SIGNAL
        if with_signal and call.signal_offset + SIGNAL_SIZE > call.len:
            raise InvalidError(f"a signal at {call.signal_offset} of {call.len} bytes")
        self._memory.write(gpa, argument)
        signal = (call.prio, call.cookie) if with_signal else None
        return self._client.share(
            call.handle, call.id, lambda post: self._memory_of(call, post), signal
        )

    def _memory_of(
        self, call: abi.DeviceShm, post: Callable[[], object]
    ) -> SharedMemory:
        view = self._memory.view(call.datap, call.len)
        try:
            if call.signal_offset == abi.NO_SIGNAL:
                return SharedMemory(call.id, view, self._memory, flags=call.flags)
            return SharedMemory(
                call.id,
                view,
                self._memory,
                flags=call.flags,
                signal_offset=call.signal_offset,
                prio=call.prio,
                cookie=call.cookie,
                post=post,
            )
        except BaseException:
            view.close()
            raise
