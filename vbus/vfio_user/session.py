"""One client of a vfio-user server, from its first message until it has left.

Requests are handled in the order in which they come, without waiting: what a function
cannot answer at once (Pending) goes on in a task of its own, and its reply follows
when it is there. So a region access is never held up by another one, nor by a DMA
message of ours.
"""

import logging
import time
from collections.abc import Awaitable, Callable

import trio

from ioq.aio import AdaptiveSpin
from vbus.errors import (
    FaultError,
    InvalidError,
    NoDeviceError,
    ProtocolError,
    VbusError,
)
from vbus.pci.constants import REGION_COUNT, Region
from vbus.pci.function import PciFunction, Pending
from vbus.pci.pending import settle
from vbus.saved import Held, Kept, SavedClient, SavedStream
from vbus.vfio_user import wire
from vbus.vfio_user.commands import Answer, DeviceCommands, UnsupportedError
from vbus.vfio_user.statistics import Counters
from vbus.vfio_user.transport import FdSocket, Received, close_all
from vbus.vfio_user.wire import Command, Message

_VERSION_TIMEOUT_S = 5.0
_RECEIVE_SIZE = 4096
_QUEUE_LIMIT = 1 << 20
_PENDING_LIMIT = 1024
_MESSAGES_BEFORE_CHECKPOINT = 64
_LOGGED_ERRORS = 20
# QEMU 11.1 loses its place in the stream when a reply of its own does not fit into the
# socket's buffer, 208 KiB by default.
_DMA_PIECE = 64 << 10
_UNSHARED = (
    "the guest's memory came without descriptors, so the guest gets EFAULT for it;"
    " start QEMU with -object memory-backend-memfd,id=mem,size=...,share=on"
    " -machine memory-backend=mem"
)

CAPABILITIES = wire.Capabilities(
    max_msg_fds=wire.MAX_MSG_FDS,
    max_data_xfer_size=wire.MAX_DATA_XFER_SIZE,
    max_dma_maps=wire.MAX_DMA_MAPS,
    pgsizes=wire.PAGE_SIZES,
    write_multiple=True,
)
_Completion = Callable[[Message, bytes | None], None]
_TAKE_FDS = frozenset({Command.DMA_MAP, Command.DEVICE_SET_IRQS})


class _Waiter:
    """A request of ours that waits for its reply."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Message | None = None


class Session:
    """Serves `function` to the client behind `sock`. `run` it once."""

    def __init__(
        self,
        function: PciFunction,
        sock: FdSocket,
        counters: Counters,
        log: "logging.LoggerAdapter[logging.Logger]",
        *,
        allow_truncatable: bool = False,
        spin_us: float = 0,
    ) -> None:
        self.commands = DeviceCommands(
            function, counters, allow_truncatable=allow_truncatable
        )
        self.pending = 0
        self.ended = trio.Event()
        self._function = function
        self._socket = sock
        self._counters = counters
        self._log = log
        self._logged = 0
        self._memory_judged = False
        self._spin = AdaptiveSpin(spin_us) if spin_us else None
        self._connection = wire.Connection()
        self._client = wire.Capabilities()
        self._versioned = trio.Event()
        self._receiving = trio.CancelScope()
        self._unpaused = trio.Event()
        self._unpaused.set()
        self._over = trio.CancelScope()
        self._settled = trio.lowlevel.ParkingLot()
        self._waiters: dict[int, _Waiter] = {}
        self._handlers = self.commands.handlers()
        # The accesses a vCPU waits for; they answer by themselves, perhaps later.
        self._accesses: dict[int, Callable[[Message], None]] = {
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
        }

    async def run(self) -> None:
        """Serve until the client leaves or breaks the protocol; then clean up."""
        try:
            with self._over:
                await self._run()
        finally:
            self._clean_up()
            self.ended.set()

    async def _run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._socket.run_sender)
            self._nursery.start_soon(self._expect_version)
            try:
                await self._receive_unless_paused()
            except ProtocolError as error:
                self._counters.protocol_errors += 1
                self._log.warning("connection ended: %s", error)
            self._nursery.cancel_scope.cancel()

    def end(self) -> None:
        """Let `run` end at once, be it not begun."""
        self._over.cancel()

    # Being replaced

    def pause(self) -> None:
        """Take no more messages; those that are under way go on."""
        self._unpaused = trio.Event()
        self._receiving.cancel()

    def unpause(self) -> None:
        """Go on."""
        self._unpaused.set()

    @property
    def busy(self) -> bool:
        """Is a request under way, or something that the function does for it?"""
        return self.pending > 0 or self._function.busy

    def save(self, kept: Kept) -> SavedClient | None:
        """Give what `resume` needs; None if the client has not said VERSION yet.

        Raises InvalidError: the function cannot be saved.
        """
        if not self._versioned.is_set():
            return None
        return SavedClient(
            self._save_stream(kept),
            self._client.max_msg_fds,
            self._client.max_data_xfer_size,
            self.commands.interrupts.save(kept),
            self._function.save(kept),
        )

    def _save_stream(self, kept: Kept) -> SavedStream:
        partial, its_fds = self._connection.partial
        next_id, outstanding = self._connection.requests
        return SavedStream(
            kept.keep(self._socket.fileno()),
            partial,
            tuple(map(kept.keep, its_fds)),
            tuple(
                (data, tuple(map(kept.keep, fds)))
                for data, fds in self._socket.unsent()
            ),
            next_id,
            outstanding,
        )

    def resume(self, saved: SavedClient, held: Held) -> None:
        """Go on where another process was; its socket is ours already. Then `run`.

        Raises a VbusError for what cannot be; then `run` ends the connection.
        """
        stream = saved.stream
        for data, its_fds in stream.unsent:
            self._socket.send_again(data, [held.take(fd) for fd in its_fds])
        self._connection.resume(stream.next_id, stream.outstanding)
        fds = [held.take(fd) for fd in stream.partial_fds]
        for message in self._connection.feed(stream.partial, fds):
            close_all(message.fds)
            raise ProtocolError("a whole message among what was half received")
        self._client = wire.Capabilities(saved.max_msg_fds, saved.max_data_xfer_size)
        self.commands.client_max_fds = saved.max_msg_fds
        self.commands.interrupts.resume(saved.interrupts, held)
        self._function.attach(self.commands.interrupts)
        self._versioned.set()
        self._function.resume(saved.bridge, held)
        self.commands.count_maps()

    def _clean_up(self) -> None:
        close_all(self._connection.abandon())
        self._socket.close()
        if self._versioned.is_set():
            self._guard(self._function.detach)
        self._function.memory.clear()
        self._counters.interrupts += self.commands.interrupts.raised
        self.commands.interrupts.raised = 0
        self.commands.interrupts.close()
        for waiter in self._waiters.values():
            waiter.done.set()

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a function's own code where its failure must not stop ours."""
        try:
            step()
        except Exception:
            self._log.exception("the function failed")

    # Receiving

    async def _expect_version(self) -> None:
        with trio.move_on_after(_VERSION_TIMEOUT_S):
            await self._versioned.wait()
            return
        self._log.warning("no VERSION within %s s", _VERSION_TIMEOUT_S)
        self._nursery.cancel_scope.cancel()

    async def _receive_unless_paused(self) -> None:
        while True:
            await self._unpaused.wait()
            with trio.CancelScope() as self._receiving:
                await self._receive()
                return

    async def _receive(self) -> None:
        handled = 0
        while True:
            received = self._socket.receive_nowait(self._receive_size())
            if received is None:
                received = await self._wait()
                handled = 0
            data, fds = received
            if not data:
                close_all(fds)
                return
            messages = self._connection.feed(data, fds)
            self._handle_all(messages)
            handled += len(messages)
            if handled >= _MESSAGES_BEFORE_CHECKPOINT:
                await trio.lowlevel.checkpoint()
                handled = 0
            await self._hold_back()

    def _receive_size(self) -> int:
        return max(_RECEIVE_SIZE, self._connection.missing)

    async def _wait(self) -> Received:
        """Wait for something to receive: look for a moment if that pays off, sleep."""
        if self._spin is None:
            return await self._sleep()
        start = time.perf_counter_ns()
        self._found: Received | None = None
        if not await self._spin.look(self._look):
            self._found = await self._sleep()
        self._spin.learn(time.perf_counter_ns() - start)
        assert self._found is not None
        return self._found

    def _look(self, duration_ns: int) -> bool:
        end = time.perf_counter_ns() + duration_ns
        while time.perf_counter_ns() < end:
            self._found = self._socket.receive_nowait(self._receive_size())
            if self._found is not None:
                return True
        return False

    async def _sleep(self) -> Received:
        while True:
            await self._socket.wait_readable()
            received = self._socket.receive_nowait(self._receive_size())
            if received is not None:
                return received

    async def _hold_back(self) -> None:
        """Take no more requests while the client leaves too many replies unread."""
        if self._socket.queued_bytes > _QUEUE_LIMIT:
            await self._socket.drained(_QUEUE_LIMIT // 2)
        while self.pending >= _PENDING_LIMIT:
            await self._settled.park()

    def _handle_all(self, messages: list[Message]) -> None:
        for done, message in enumerate(messages):
            try:
                self._handle(message)
            except BaseException:
                for lost in messages[done + 1 :]:
                    close_all(lost.fds)
                raise

    def _handle(self, message: Message) -> None:
        """Answer one message. Its descriptors end in an owner, or closed."""
        self._counters.messages += 1
        fds = list(message.fds)
        try:
            if message.is_reply:
                self._resolve(message)
                return
            if fds and message.command not in _TAKE_FDS:
                raise InvalidError(f"{len(fds)} descriptors that nobody takes")
            access = self._accesses.get(message.command)
            if access is not None and self._versioned.is_set():
                access(message)
            else:
                self._answer(message, self._command(message, fds))
        except VbusError as error:
            self._refuse(message, error.errno, str(error))
            if isinstance(error, ProtocolError):
                raise
        except Exception:
            self._fail(message)
        finally:
            close_all(fds)

    def _command(self, message: Message, fds: list[int]) -> Answer:
        if message.command == Command.VERSION:
            return self._version(message.body)
        if not self._versioned.is_set():
            raise ProtocolError(f"{wire.command_name(message.command)} before VERSION")
        handler = self._handlers.get(message.command)
        if handler is None:
            raise UnsupportedError("not supported")
        return handler(message.body, fds)

    def _version(self, body: bytes) -> Answer:
        if self._versioned.is_set():
            raise InvalidError("a second VERSION")
        try:
            version = wire.Version.unpack(body)
        except InvalidError as error:
            raise ProtocolError(str(error)) from error
        if version.major != wire.VERSION_MAJOR:
            raise ProtocolError(f"version {version.major}.{version.minor}")
        self._client = version.capabilities
        self.commands.client_max_fds = version.capabilities.max_msg_fds
        self._function.attach(self.commands.interrupts)
        self._versioned.set()
        minor = min(version.minor, wire.VERSION_MINOR)
        return Answer(wire.Version(version.major, minor, CAPABILITIES).pack())

    # Answering

    def _answer(self, request: Message, answer: Answer) -> None:
        if not request.wants_reply:
            return
        if answer.fds:
            self._socket.send(wire.reply(request, answer.body), answer.fds)
        else:
            self._send(wire.reply(request, answer.body))

    def _send(self, reply: bytes) -> None:
        """Send a reply, once nobody uses any more what it says is given up."""
        fence = self._function.fence()
        if fence is None:
            self._socket.send(reply)
        else:
            self.pending += 1
            self._nursery.start_soon(self._send_after, fence, reply)

    async def _send_after(
        self, fence: Callable[[], Awaitable[object]], reply: bytes
    ) -> None:
        try:
            await fence()
            self._socket.send(reply)
        finally:
            self.pending -= 1
            self._settled.unpark_all()

    def _refuse(self, request: Message, code: int, why: str) -> None:
        """Answer with an error, count it, and log it unless there are too many."""
        self._counters.errors += 1
        self._logged += 1
        if self._logged <= _LOGGED_ERRORS:
            name = wire.command_name(request.command)
            self._log.warning("%s refused: %s: %s", name, wire.error_name(code), why)
            if self._logged == _LOGGED_ERRORS:
                self._log.warning("further errors of this client are only counted")
        if request.wants_reply:
            self._send(wire.error_reply(request, code))

    def _fail(self, request: Message) -> None:
        """Answer EIO for an error of the function's own code."""
        self._counters.errors += 1
        self._log.exception("%s failed", wire.command_name(request.command))
        if request.wants_reply:
            self._send(wire.error_reply(request, VbusError.errno))

    # Region accesses

    def _region_read(self, message: Message) -> None:
        offset, region, size, _ = wire.RegionAccess.unpack(message.body)
        self._check(region, size)
        self._counters.region_reads[region] += 1
        data = self._function.read(region, offset, size)
        if isinstance(data, Pending):
            self._settle_later(message, [data], self._answer_read)
        else:
            self._answer_read(message, data)

    def _answer_read(self, message: Message, data: bytes | None) -> None:
        size = wire.RegionAccess.unpack(message.body).size
        if data is None or len(data) != size:
            raise RuntimeError(f"the function gave {data!r} for {size} bytes")
        if message.wants_reply:
            self._send(wire.reply(message, message.body[:16] + data))

    def _region_write(self, message: Message) -> None:
        offset, region, size, data = wire.RegionAccess.unpack_data(message.body)
        self._check(region, size)
        self._counters.region_writes[region] += 1
        if not self._memory_judged and region != Region.CONFIG:
            self._judge_memory()
        pending = self._function.write(region, offset, data)
        if pending is None:
            self._answer_write(message)
        else:
            self._settle_later(message, [pending], self._answer_write)

    def _answer_write(self, message: Message, _data: bytes | None = None) -> None:
        if message.wants_reply:
            self._send(wire.reply(message, message.body[:16]))

    def _region_write_multi(self, message: Message) -> None:
        """Begin all writes in order; the reply follows when all are done."""
        pending = []
        for offset, region, size, data in wire.WriteMulti.unpack(message.body).writes:
            self._check(region, size)
            self._counters.region_writes[region] += 1
            result = self._function.write(region, offset, data)
            if result is not None:
                pending.append(result)
        if pending:
            self._settle_later(message, pending, self._answer_write_multi)
        else:
            self._answer_write_multi(message)

    def _answer_write_multi(self, message: Message, _data: bytes | None = None) -> None:
        done = len(wire.WriteMulti.unpack(message.body).writes)
        self._answer(message, Answer(wire.pack_write_multi_reply(done)))

    def _judge_memory(self) -> None:
        """A driver is at work: if its memory is out of reach, say why, and only once.

        A few ranges always come without a descriptor: BARs of other devices. Where
        they are more than the rest, the machine's own memory is among them.
        """
        memory = self._function.memory
        backed = memory.statistics().mapped_bytes
        unbacked = sum(one.size for one in memory.regions() if not one.backed)
        self._memory_judged = bool(backed or unbacked)
        if unbacked > backed:
            self._log.warning(_UNSHARED)

    def _check(self, region: int, size: int) -> None:
        if region >= REGION_COUNT:
            raise InvalidError(f"there is no region {region}")
        if not 0 < size <= wire.MAX_DATA_XFER_SIZE:
            raise InvalidError(f"a region access of {size} bytes")

    def _settle_later(
        self, message: Message, pending: list[Pending], answer: _Completion
    ) -> None:
        self.pending += 1
        self._nursery.start_soon(self._settle, message, pending, answer)

    async def _settle(
        self, message: Message, pending: list[Pending], answer: _Completion
    ) -> None:
        try:
            data = None
            for each in pending:
                data = await settle(each)
            answer(message, data)
        except VbusError as error:
            self._refuse(message, error.errno, str(error))
        except Exception:
            self._fail(message)
        finally:
            self.pending -= 1
            self._settled.unpark_all()

    # Our own requests

    async def dma_read(self, address: int, size: int) -> bytes:
        """Read guest memory by messages; see VfioUserServer.dma_read."""
        pieces = []
        for at, length in self._pieces(address, size):
            request = wire.DmaAccess(at, length).pack()
            message = await self._request(Command.DMA_READ, request)
            answer = wire.DmaAccess.unpack_data(message.body)
            if answer.size != length:
                raise FaultError(f"DMA_READ of {length} bytes gave {answer.size}")
            pieces.append(answer.data)
        return b"".join(pieces)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write guest memory by messages; see VfioUserServer.dma_write."""
        for at, length in self._pieces(address, len(data)):
            piece = data[at - address : at - address + length]
            request = wire.DmaAccess(at, length, piece).pack()
            await self._request(Command.DMA_WRITE, request)

    def _pieces(self, address: int, size: int) -> list[tuple[int, int]]:
        most = min(self._client.max_data_xfer_size, _DMA_PIECE)
        if not most:
            raise UnsupportedError("the client takes no data in messages")
        end = address + size
        return [(at, min(most, end - at)) for at in range(address, end, most)]

    async def _request(self, command: int, body: bytes) -> Message:
        if self.ended.is_set() or not self._versioned.is_set():
            raise NoDeviceError("no client is attached")
        ident, data = self._connection.request(command, body)
        waiter = self._waiters[ident] = _Waiter()
        self._socket.send(data)
        self._counters.dma_messages += 1
        try:
            await waiter.done.wait()
        finally:
            if self._waiters.get(ident) is waiter:
                del self._waiters[ident]
        if waiter.reply is None:
            raise NoDeviceError("the client left while DMA was under way")
        if waiter.reply.failed:
            raise FaultError(
                f"{wire.command_name(command)} was refused by the client:"
                f" {wire.error_name(waiter.reply.error)}"
            )
        return waiter.reply

    def _resolve(self, message: Message) -> None:
        """Hand a reply to who waits for it, if somebody still does."""
        waiter = self._waiters.pop(message.id, None)
        if waiter is not None:
            waiter.reply = message
            waiter.done.set()
