"""The control socket: who may ask, and one task per client that answers it."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vbus.control import wire
from vbus.control.operations import errno_name, perform
from vbus.control.streams import STREAMS, open_stream
from vbus.errors import BusyError, PermissionDeniedError, ProtocolError, VbusError
from vbus.sockets import peer_of

if TYPE_CHECKING:
    from vbus.daemon import Daemon

CLIENT_LIMIT = 64
SEND_TIMEOUT_S = 10
_ACCEPT_PAUSE_S = 0.1
_RECEIVE_SIZE = 65536

logger = logging.getLogger(__name__)


class ControlServer:
    """Serves the control protocol on `path` to those whom `daemon.access` allows.

    The file has mode 0600, or 0660 for a group; whom it still lets in by descriptor
    passing or a changed mode is checked by SO_PEERCRED, and told when refused.
    """

    def __init__(self, daemon: "Daemon", path: Path) -> None:
        self._daemon = daemon
        self._path = path
        self._clients = 0

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen until cancelled; started once the socket is there.

        Raises what `vbus.sockets.listen` does.
        """
        listener = self._daemon.listeners.listen(self._path)
        try:
            self._daemon.access.grant(self._path)
            sock = trio.socket.from_stdlib_socket(listener.sock)
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    await self._accept(sock, nursery)
        finally:
            listener.close()

    async def _accept(
        self, listener: trio.socket.SocketType, nursery: trio.Nursery
    ) -> None:
        try:
            client, _ = await listener.accept()
        except OSError as error:  # out of descriptors, or the client is gone already
            logger.warning("control socket: %s", error)
            await trio.sleep(_ACCEPT_PAUSE_S)
        else:
            nursery.start_soon(self._serve_client, client)

    async def _serve_client(self, sock: trio.socket.SocketType) -> None:
        self._clients += 1
        try:
            with sock:
                await _Client(self._daemon, sock).serve(self._refusal(sock))
        except (OSError, trio.TooSlowError) as error:
            logger.debug("control client gone: %r", error)
        except Exception:
            logger.exception("a control client's connection failed")
        finally:
            self._clients -= 1

    def _refusal(self, sock: trio.socket.SocketType) -> VbusError | None:
        pid, uid, _ = peer_of(sock)
        if not self._daemon.access.allows(sock):
            logger.warning("control client %d of uid %d refused", pid, uid)
            return PermissionDeniedError("this daemon belongs to another user")
        if self._clients > CLIENT_LIMIT:
            logger.warning("control client %d refused: too many", pid)
            return BusyError(f"more than {CLIENT_LIMIT} control clients")
        return None


class _Client:
    """One connection: requests are answered one after the other."""

    def __init__(self, daemon: "Daemon", sock: trio.socket.SocketType) -> None:
        self._daemon = daemon
        self._sock = sock

    async def serve(self, refusal: VbusError | None) -> None:
        """Answer until the client leaves, or breaks the protocol."""
        if refusal is not None:
            await self._fail(0, refusal)
            return
        frames = wire.Frames()
        try:
            while data := await self._sock.recv(_RECEIVE_SIZE):
                for body in frames.feed(data):
                    await self._answer(wire.to_request(body))
        except ProtocolError as error:
            logger.warning("control client: %s", error)
            await self._fail(0, error)

    async def _answer(self, request: wire.Request) -> None:
        if request.op in STREAMS:
            await self._stream(request)
            return
        try:
            with self._daemon.changing():
                result = await perform(self._daemon, request.op, request.args)
        except (VbusError, OSError) as error:
            await self._fail(request.id, error)
        except Exception as error:  # a bug, most likely of a device
            logger.exception("%s failed", request.op)
            await self._fail(request.id, VbusError(f"{request.op} failed: {error!r}"))
        else:
            await self._succeed(request.id, result)

    async def _succeed(self, id: int, result: object) -> None:
        try:
            for frame in wire.encode_answer(wire.Answer(id, result=result)):
                await self._send(frame)
        except ProtocolError as error:
            await self._fail(id, error)

    async def _fail(self, id: int, error: VbusError | OSError) -> None:
        failure = wire.Failure(errno_name(error.errno), str(error)[:4096])
        await self._send(wire.encode(wire.Answer(id, error=failure)))

    async def _send(self, frame: bytes) -> None:
        with trio.fail_after(SEND_TIMEOUT_S):
            await self._send_patiently(frame)

    async def _send_patiently(self, frame: bytes) -> None:
        data = memoryview(frame)
        while data:
            data = data[await self._sock.send(data) :]

    async def _stream(self, request: wire.Request) -> None:
        """Send what a stream gives until the client leaves.

        One that does not read costs no more than the stream holds, so it may take its
        time: whoever pages through `vbus events` reads again later.
        """
        try:
            with open_stream(self._daemon, request.op, request.args) as stream:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until_hung_up, nursery.cancel_scope)
                    with suppress(OSError, trio.TooSlowError):
                        await self._succeed(request.id, stream.first)
                        while True:
                            event = wire.Answer(request.id, event=await stream.next())
                            for frame in wire.encode_answer(event):
                                await self._send_patiently(frame)
        except VbusError as error:
            await self._fail(request.id, error)

    async def _until_hung_up(self, scope: trio.CancelScope) -> None:
        with suppress(OSError):
            while await self._sock.recv(_RECEIVE_SIZE):
                pass
        scope.cancel()
