"""A vfio-user client: a PCI function that another process serves on a unix socket.

Several requests are under way at once, each waiting for its own reply. When the server
leaves or breaks the protocol every waiter gets the same error, and so does every later
access.
"""

import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from ioq import AdaptiveSpin
from proxy.doorbells import DoorbellTable
from proxy.errors import again, refusal
from proxy.memory import DmaMemory
from proxy.pci import Abort, Interrupts, PciFunction
from proxy.tasks import beside
from vbus.errors import (
    InvalidError,
    NoDeviceError,
    ProtocolError,
    UnreachableError,
    VbusError,
)
from vbus.pci.constants import (
    MSI_ENABLE,
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    Capability,
    Irq,
    Region,
)
from vbus.vfio_user import wire
from vbus.vfio_user.transport import FdSocket, Received, close_all
from vbus.vfio_user.wire import Command, DmaFlag, IrqSetFlag, Message

MAX_FDS = 8
"""What we take in one message, so that a look for a new doorbell brings few others."""
SPIN_US = 80.0
"""A call takes about 45 us while both ends are awake."""
ANSWER_TIMEOUT_S = 20.0
"""Well over the time in which a host answers a call of a device that does not."""
_RECEIVE_SIZE = 4096
_VERSION_TIMEOUT_S = 5.0
_TURN_NS = 50_000

T = TypeVar("T")


class _InterruptKind(NamedTuple):
    capability: Capability
    enable: int
    mask: int = 0


_INTERRUPT_KINDS = {
    Irq.MSI: _InterruptKind(Capability.MSI, MSI_ENABLE),
    Irq.MSIX: _InterruptKind(Capability.MSIX, MSIX_ENABLE, MSIX_FUNCTION_MASK),
}


@dataclass(frozen=True)
class ClientStatistics:
    """Requests answered or posted, how `post`ed doorbells went, and DMA messages."""

    requests: int
    posted_writes: int
    doorbells_by_eventfd: int
    doorbells_by_message: int
    dma_messages: int


class _Waiter:
    """A request under way: what came of it, and who to wake."""

    __slots__ = ("done", "error", "event", "reply", "since_ns")

    def __init__(self) -> None:
        self.done = False
        self.reply: Message | None = None
        self.error: VbusError | None = None
        self.event = trio.Event()
        self.since_ns = time.perf_counter_ns()

    def settle(self, reply: Message | None, error: VbusError | None = None) -> None:
        if self.done:  # nobody waits any more
            close_all(reply.fds if reply is not None else ())
            return
        self.done = True
        self.reply = reply
        self.error = error
        self.event.set()

    def abandon(self) -> None:
        """Nobody waits any more, whether or not the reply is there."""
        if self.reply is not None:
            close_all(self.reply.fds)
        self.done = True


_Callback = Callable[[Message], None]


class VfioUserClient(PciFunction):
    """The client's end of one connection. Made by `connect`."""

    def __init__(
        self, sock: socket.socket, memory: DmaMemory, *, spin_us: float = SPIN_US
    ) -> None:
        self.memory = memory
        self.error: VbusError | None = None
        self.regions: dict[int, wire.RegionInfo] = {}
        self._vectors: dict[int, int] = {}
        self._socket = FdSocket(sock, MAX_FDS)
        self._connection = wire.Connection(max_fds=MAX_FDS)
        self._spin = AdaptiveSpin(spin_us)
        self._turn_ends = 0
        self._waiters: dict[int, _Waiter | _Callback] = {}
        self._doorbells = DoorbellTable()
        self._interrupts: dict[int, Interrupts] = {}
        self._requests = self._posted = self._dma_messages = 0
        self._by_eventfd = self._by_message = 0

    # Life

    async def start(self) -> None:
        """Agree on a version, learn the function's shape and map the memory."""
        version = wire.Version(
            wire.VERSION_MAJOR,
            wire.VERSION_MINOR,
            wire.Capabilities(max_msg_fds=MAX_FDS, pgsizes=wire.PAGE_SIZES),
        )
        with trio.move_on_after(_VERSION_TIMEOUT_S) as deadline:
            answer = await self._request(Command.VERSION, version.pack())
        if deadline.cancelled_caught:
            raise UnreachableError(f"no answer within {_VERSION_TIMEOUT_S} s")
        agreed = _parse(wire.Version.unpack, answer)
        if agreed.major != wire.VERSION_MAJOR:
            raise ProtocolError(f"the server speaks vfio-user version {agreed.major}")
        await self._look_around()
        memory = self.memory
        flags = DmaFlag.READ | DmaFlag.WRITE
        mapping = wire.DmaMap(flags, 0, memory.base, memory.size)
        await self._request(Command.DMA_MAP, mapping.pack(), [memory.fd])

    async def run(self) -> None:
        """Receive until cancelled or until the server is gone: then `error` is set."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._socket.run_sender)
            nursery.start_soon(self._watch)
            while self.error is None:
                received = self._socket.receive_nowait(self._receive_size())
                if received is None:
                    await self._socket.wait_readable()
                else:
                    self._take(received)
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Leave. Whoever waits gets NoDeviceError. Idempotent."""
        self.lose(NoDeviceError("the connection to the host is closed"))
        self._socket.close()

    async def _watch(self) -> None:
        """Give the host up once it leaves a request unanswered for too long.

        Some requests cannot be cancelled, so nothing else would end them.
        """
        while True:
            await trio.sleep(ANSWER_TIMEOUT_S / 4)
            limit = time.perf_counter_ns() - ANSWER_TIMEOUT_S * 1e9
            for waiter in self._waiters.values():
                if isinstance(waiter, _Waiter) and waiter.since_ns < limit:
                    reason = f"the host has not answered for {ANSWER_TIMEOUT_S} s"
                    self.lose(NoDeviceError(reason))
                    return

    def lose(self, error: VbusError) -> None:
        """The connection is over: fail all waiters, close all we were given."""
        if self.error is not None:
            return
        self.error = error
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if isinstance(waiter, _Waiter):
                waiter.settle(None, error)
        for interrupts in self._interrupts.values():
            interrupts.fail(error)
        self._doorbells.close()
        close_all(self._connection.abandon())

    async def _look_around(self) -> None:
        reply = await self._request(Command.DEVICE_GET_INFO, wire.DeviceInfo().pack())
        info = _parse(wire.DeviceInfo.unpack, reply)
        if not info.flags & wire.DeviceFlag.PCI:
            raise ProtocolError("the server's device is no PCI function")
        for index in range(min(info.regions, len(Region))):
            request = wire.RegionInfo(index).pack()
            reply = await self._request(Command.DEVICE_GET_REGION_INFO, request)
            close_all(reply.fds)
            self.regions[index] = _parse(wire.RegionInfo.unpack, reply)
        for index in range(min(info.irqs, len(Irq))):
            request = wire.IrqInfo(index).pack()
            reply = await self._request(Command.DEVICE_GET_IRQ_INFO, request)
            self._vectors[index] = _parse(wire.IrqInfo.unpack, reply).vectors

    # PciFunction

    async def config_read(self, offset: int, size: int) -> bytes:
        return await self._read(Region.CONFIG, offset, size)

    async def config_write(self, offset: int, data: bytes) -> None:
        await self._write(Region.CONFIG, offset, data)

    async def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        return await self._read(bar, offset, size)

    async def bar_write(
        self, bar: int, offset: int, data: bytes, abort: Abort | None = None
    ) -> None:
        await self._write(bar, offset, data, abort)

    def post_write(self, bar: int, offset: int, data: bytes) -> None:
        if self.error is not None:
            raise again(self.error)
        access = wire.RegionAccess(offset, bar, len(data), data)
        _, message = self._connection.request(
            Command.REGION_WRITE, access.pack(), no_reply=True
        )
        self._posted += 1
        self._socket.send(message)

    def ring_doorbell(self, bar: int, offset: int, value: int) -> None:
        if self._doorbells.ring((bar, offset, value)):
            self._by_eventfd += 1
        else:
            self._by_message += 1
            self.post_write(bar, offset, value.to_bytes(4, "little"))

    def add_doorbell(self, bar: int, offset: int, value: int) -> None:
        if self.error is not None:
            raise again(self.error)
        self._doorbells.want((bar, offset, value))
        room = wire.INFO_SIZE + MAX_FDS * wire.IO_FD_SIZE
        request = wire.RegionIoFds(bar, argsz=room).pack()
        ident, message = self._connection.request(
            Command.DEVICE_GET_REGION_IO_FDS, request
        )
        self._waiters[ident] = self._take_doorbells
        self._socket.send(message)

    def remove_doorbell(self, bar: int, offset: int, value: int) -> None:
        self._doorbells.forget((bar, offset, value))

    def interrupt_vectors(self, kind: Irq) -> int:
        return self._vectors.get(kind, 0)

    async def enable_interrupts(self, kind: Irq, vectors: int) -> Interrupts:
        setting = _INTERRUPT_KINDS[kind]
        at = await self.find_capability(setting.capability)
        if not at or not 0 < vectors <= self.interrupt_vectors(kind):
            raise InvalidError(f"the function has no {vectors} {kind.name} vectors")
        interrupts = Interrupts(vectors)
        try:
            flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
            request = wire.SetIrqs(flags, kind, 0, vectors).pack()
            fds = [bell.fileno() for bell in interrupts.doorbells]
            await self._request(Command.DEVICE_SET_IRQS, request, fds)
            control = await self.config_read_u16(at + 2)
            control = control & ~setting.mask | setting.enable
            await self.config_write(at + 2, control.to_bytes(2, "little"))
        except BaseException:
            interrupts.close()
            raise
        self._interrupts[kind] = interrupts
        return interrupts

    async def reset(self) -> None:
        await self._request(Command.DEVICE_RESET)

    def statistics(self) -> ClientStatistics:
        """A snapshot of the counters."""
        return ClientStatistics(
            self._requests,
            self._posted,
            self._by_eventfd,
            self._by_message,
            self._dma_messages,
        )

    # Requests

    async def _read(self, region: int, offset: int, size: int) -> bytes:
        request = wire.RegionAccess(offset, region, size).pack()
        reply = await self._request(Command.REGION_READ, request)
        data = _parse(wire.RegionAccess.unpack_data, reply).data
        if len(data) != size:
            raise ProtocolError(f"a read of {size} bytes gave {len(data)}")
        return data

    async def _write(
        self, region: int, offset: int, data: bytes, abort: Abort | None = None
    ) -> None:
        request = wire.RegionAccess(offset, region, len(data), data).pack()
        await self._request(Command.REGION_WRITE, request, (), abort)

    async def _request(
        self,
        command: int,
        body: bytes = b"",
        fds: Sequence[int] = (),
        abort: Abort | None = None,
    ) -> Message:
        """Send a request and wait for its reply, whose descriptors are the caller's.

        Lets a cancellation in, and other tasks run at least every 50 microseconds.
        Cancelled or aborted, the request may still be served.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.error is not None:
            raise again(self.error)
        ident, message = self._connection.request(command, body)
        waiter = self._waiters[ident] = _Waiter()
        if abort is not None:
            abort.hook = partial(waiter.settle, None)
        self._requests += 1
        try:
            self._socket.send(message, fds)
            await self._wait(waiter)
        except BaseException:
            waiter.abandon()
            raise
        if waiter.error is not None:
            raise again(waiter.error)
        reply = waiter.reply
        assert reply is not None
        if reply.failed:
            close_all(reply.fds)
            raise refusal(reply.error, f"the host refused {wire.command_name(command)}")
        return reply

    async def _wait(self, waiter: _Waiter) -> None:
        """Look for the reply for a moment if that pays off, then sleep."""
        if not await self._spin.look(lambda limit_ns: self._look(waiter, limit_ns)):
            await waiter.event.wait()
            self._turn_ends = time.perf_counter_ns() + _TURN_NS
        now = time.perf_counter_ns()
        self._spin.learn(now - waiter.since_ns)
        if now >= self._turn_ends:
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._turn_ends = time.perf_counter_ns() + _TURN_NS

    def _look(self, waiter: _Waiter, limit_ns: int) -> bool:
        end = time.perf_counter_ns() + limit_ns
        while not waiter.done and time.perf_counter_ns() < end:
            received = self._socket.receive_nowait(self._receive_size())
            if received is not None:
                self._take(received)
        return waiter.done

    # Receiving

    def _receive_size(self) -> int:
        return max(_RECEIVE_SIZE, self._connection.missing)

    def _take(self, received: Received) -> None:
        """Handle what was received; the end of the stream and nonsense end it all."""
        data, fds = received
        if not data:
            close_all(fds)
            self.lose(NoDeviceError("the host closed the connection"))
            return
        try:
            messages = self._connection.feed(data, fds)
        except ProtocolError as error:
            self._break(error)
            return
        for message in messages:
            try:
                self._handle(message)
            except VbusError as error:
                self._break(error)

    def _break(self, error: VbusError) -> None:
        self.lose(ProtocolError(f"the host broke the protocol: {error}"))

    def _handle(self, message: Message) -> None:
        waiter = self._waiters.pop(message.id, None) if message.is_reply else None
        if isinstance(waiter, _Waiter):
            waiter.settle(message)
        elif waiter is not None:
            waiter(message)
        else:
            close_all(message.fds)
            if not message.is_reply and self.error is None:
                self._serve(message)

    def _serve(self, message: Message) -> None:
        """Answer a request of the server's: DMA without a mapping."""
        self._dma_messages += 1
        space = self.memory.space
        try:
            if message.command == Command.DMA_READ:
                access = wire.DmaAccess.unpack(message.body)
                if access.size > wire.MAX_DATA_XFER_SIZE:
                    raise InvalidError(f"DMA_READ of {access.size} bytes")
                data = space.read(access.address, access.size)
                body = wire.DmaAccess(access.address, access.size, data).pack()
            elif message.command == Command.DMA_WRITE:
                access = wire.DmaAccess.unpack_data(message.body)
                space.write(access.address, access.data)
                body = wire.DmaAccess(access.address, access.size).pack()
            else:
                raise refusal(errno.ENOTSUP, "not a request to a client")
        except VbusError as error:
            answer = wire.error_reply(message, error.errno)
        else:
            answer = wire.reply(message, body)
        if message.wants_reply:
            self._socket.send(answer)

    def _take_doorbells(self, reply: Message) -> None:
        if reply.failed:
            close_all(reply.fds)
            return
        try:
            answer = _parse(wire.RegionIoFds.unpack, reply)
        except ProtocolError:
            close_all(reply.fds)
            raise
        self._doorbells.take(answer, reply.fds)


def _parse(unpack: Callable[[bytes], T], reply: Message) -> T:
    """Unpack a reply; a malformed one is the server's fault."""
    try:
        return unpack(reply.body)
    except InvalidError as error:
        raise ProtocolError(str(error)) from error


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str], memory: DmaMemory, *, spin_us: float = SPIN_US
) -> AsyncIterator[VfioUserClient]:
    """Attach to the function served at `path`, with `memory` as the guest's memory.

    Raises UnreachableError if nobody serves there, BusyError if another client is
    attached, and another VbusError if the server refuses. If the server goes later, the
    body goes on: its next access raises NoDeviceError.
    """
    client = VfioUserClient(await _dial(path), memory, spin_us=spin_us)
    try:
        async with beside(client.run):
            await client.start()
            yield client
    finally:
        client.close()


async def _dial(path: str | os.PathLike[str]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A full backlog would refuse a non-blocking connect, so wait in a thread.
        sock.settimeout(_VERSION_TIMEOUT_S)
        await trio.to_thread.run_sync(sock.connect, os.fspath(path))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise UnreachableError(f"cannot reach {os.fspath(path)}: {reason}") from error
    except BaseException:
        sock.close()
        raise
    return sock
