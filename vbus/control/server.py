"""The control socket: who may ask, one task per client, a stream of events."""

import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vbus.control import wire
from vbus.control.operations import errno_name, perform
from vbus.errors import InvalidError, PermissionDeniedError, ProtocolError, VbusError
from vbus.sockets import listen, peer_of, unlinker

if TYPE_CHECKING:
    from vbus.daemon import Daemon

CLIENT_LIMIT = 64
EVENT_BACKLOG = 4096
_SEND_TIMEOUT_S = 10
_ACCEPT_PAUSE_S = 0.1
_RECEIVE_SIZE = 65536

logger = logging.getLogger(__name__)


class ControlServer:
    """Serves the control protocol on `path` to root and to the daemon's own user.

    The file has mode 0600; whom it still lets in by descriptor passing or a changed
    mode is checked by SO_PEERCRED, and told when refused.
    """

    def __init__(self, daemon: "Daemon", path: Path) -> None:
        self._daemon = daemon
        self._path = path
        self._allowed = {0, os.geteuid()}
        self._clients = 0

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen until cancelled; started once the socket is there.

        Raises BusyError, ExistsError or OSError if it cannot be.
        """
        with trio.socket.from_stdlib_socket(listen(self._path)) as listener:
            unlink = unlinker(self._path)
            try:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    while True:
                        await self._accept(listener, nursery)
            finally:
                unlink()

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
            logger.exception("a control client's request failed")
        finally:
            self._clients -= 1

    def _refusal(self, sock: trio.socket.SocketType) -> VbusError | None:
        peer = peer_of(sock)
        if peer.uid not in self._allowed:
            logger.warning("control client %d of uid %d refused", peer.pid, peer.uid)
            return PermissionDeniedError("this daemon belongs to another user")
        if self._clients > CLIENT_LIMIT:
            return InvalidError(f"more than {CLIENT_LIMIT} control clients")
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
        if request.op == "events":
            await self._stream(request.id)
            return
        try:
            result = await perform(self._daemon, request.op, request.args)
        except (VbusError, OSError) as error:
            await self._fail(request.id, error)
            return
        await self._send(wire.Answer(request.id, result=result))

    async def _fail(self, id: int, error: VbusError | OSError) -> None:
        failure = wire.Failure(errno_name(error.errno), str(error))
        await self._send(wire.Answer(id, error=failure))

    async def _send(self, answer: wire.Answer) -> None:
        try:
            data = memoryview(wire.encode(answer))
        except ProtocolError as error:
            failure = wire.Failure(errno_name(error.errno), str(error))
            data = memoryview(wire.encode(wire.Answer(answer.id, error=failure)))
        with trio.fail_after(_SEND_TIMEOUT_S):
            while data:
                data = data[await self._sock.send(data) :]

    async def _stream(self, id: int) -> None:
        """Send every change until the client leaves; a slow one is told its losses."""
        waiting: deque[dict[str, object]] = deque()
        more = trio.lowlevel.ParkingLot()
        lost = 0

        def note(happening: dict[str, object]) -> None:
            nonlocal lost
            if len(waiting) < EVENT_BACKLOG:
                waiting.append(happening)
            else:
                lost += 1
            more.unpark()

        async with trio.open_nursery() as nursery:
            unwatch = self._daemon.watch(note)
            nursery.start_soon(self._until_hung_up, nursery.cancel_scope)
            try:
                await self._send(wire.Answer(id, result=True))
                while True:
                    while waiting:
                        await self._send(wire.Answer(id, event=waiting.popleft()))
                    if lost:
                        count, lost = lost, 0
                        event: dict[str, object] = {"event": "lost", "count": count}
                        await self._send(wire.Answer(id, event=event))
                    await more.park()
            finally:
                unwatch()

    async def _until_hung_up(self, scope: trio.CancelScope) -> None:
        with suppress(OSError):
            while await self._sock.recv(_RECEIVE_SIZE):
                pass
        scope.cancel()
