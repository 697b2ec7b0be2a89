"""A trio server that shows one PCI function to one vfio-user client at a time.

It owns the unix socket: who may connect, who is refused and why, and that the next
client finds the function as new. What a client says is handled in `session`.
"""

import errno
import logging
import os
import select
import socket
from collections.abc import Collection, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from vbus.errors import InvalidError, NoDeviceError, ProtocolError, VbusError
from vbus.pci.function import PciFunction
from vbus.saved import Held, Kept, SavedClient
from vbus.sockets import Listeners, Peer, peer_of
from vbus.vfio_user import wire
from vbus.vfio_user.session import Session
from vbus.vfio_user.statistics import (
    ClientStatistics,
    Counters,
    ServerStatistics,
)
from vbus.vfio_user.transport import FdSocket, close_all

_REFUSAL_TIMEOUT_S = 2.0
_MOST_REFUSALS = 8
_ACCEPT_PAUSE_S = 0.1

logger = logging.getLogger(__name__)


class VfioUserServer:
    """Serves `function` on the unix socket `path`, which belongs to one guest.

    The socket has mode 0600. Connections are taken from `allowed_uids` only, by
    default from `owner_uid`; with an `owner_uid` (default: our own) the socket is
    given to that user. `name` is for log lines. `allow_truncatable` takes guest
    memory whose file could shrink, which then ends this process by SIGBUS. With
    `spin_us` the server looks for the next message up to that long before it sleeps.
    `listeners` may have the socket already. A client that another process served is
    `resumed`, with descriptors from `held`.
    """

    def __init__(
        self,
        function: PciFunction,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        owner_uid: int | None = None,
        allowed_uids: Collection[int] | None = None,
        allow_truncatable: bool = False,
        spin_us: float = 0,
        listeners: Listeners | None = None,
        resumed: SavedClient | None = None,
        held: Held | None = None,
    ) -> None:
        self.function = function
        self.path = Path(path)
        self._owner_uid = os.geteuid() if owner_uid is None else owner_uid
        self._allowed_uids = frozenset(
            (self._owner_uid,) if allowed_uids is None else allowed_uids
        )
        self._allow_truncatable = allow_truncatable
        self._spin_us = spin_us
        self._listeners = Listeners() if listeners is None else listeners
        self._resumed = resumed
        self._held = Held() if held is None else held
        self._paused = False
        self._counters = Counters()
        self._at_attach = self._counters.frozen(None, 0, 0)
        self._session: Session | None = None
        self._peer: Peer | None = None
        self._client_socket: FdSocket | None = None
        self._refusals = 0
        self._log = _Log(name or self.path.name)

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; started once the socket is there.

        Raises BusyError if another server answers on the path and ExistsError if
        something that is no socket stands there.
        """
        listener = self._listeners.listen(self.path, self._owner_uid)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.function.run)
                if self._resumed is not None:
                    self._resume(self._resumed, nursery)
                task_status.started()
                while True:
                    await self._accept(listener.sock, nursery)
        finally:
            listener.close()

    @property
    def attached(self) -> bool:
        """Is a client there?"""
        return self._session is not None

    def statistics(self) -> ServerStatistics:
        """Take a snapshot of the counters."""
        session = self._session
        interrupts = session.commands.interrupts.raised if session else 0
        pending = session.pending if session else 0
        return self._counters.frozen(self._peer, interrupts, pending)

    def client_statistics(self) -> ClientStatistics:
        """What the client has asked for since it attached, or the last one did."""
        return ClientStatistics.between(self._at_attach, self.statistics())

    async def dma_read(self, address: int, size: int) -> bytes:
        """Read guest memory that came without a descriptor, by messages.

        Never await this inside of a Pending access: a client may serve DMA messages
        only after it has the answer to its access (QEMU does). Raises FaultError if
        the client refuses and NoDeviceError if there is none or it leaves.
        """
        return await self._attached().dma_read(address, size)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write guest memory by messages; all that is said of `dma_read` holds."""
        await self._attached().dma_write(address, data)

    def _attached(self) -> Session:
        if self._session is None:
            raise NoDeviceError("no client is attached")
        return self._session

    # The socket

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, or the client is gone already
            self._log.warning("accept: %s", error)
            await trio.sleep(_ACCEPT_PAUSE_S)
            return
        fd_socket = FdSocket(sock, wire.MAX_MSG_FDS)
        peer = peer_of(sock)
        try:
            code, why = await self._refusal(peer)
        except trio.Cancelled:
            fd_socket.close()
            raise
        if not code:
            self._start(fd_socket, peer, nursery)
            return
        self._counters.refused += 1
        self._log.warning("client %d of uid %d refused: %s", peer.pid, peer.uid, why)
        if self._refusals < _MOST_REFUSALS:
            self._refusals += 1
            nursery.start_soon(self._refuse, fd_socket, code)
        else:
            fd_socket.close()

    async def _refusal(self, peer: Peer) -> tuple[int, str]:
        """Find out whether a client may stay: an errno and a reason, or 0."""
        if peer.uid not in self._allowed_uids:
            return errno.EACCES, "this socket belongs to another user"
        if self._session is None:
            return 0, ""
        if self._client_socket is not None and _hung_up(self._client_socket):
            await self._session.ended.wait()
            return 0, ""
        return errno.EBUSY, "another client is attached"

    def _resume(self, saved: SavedClient, nursery: trio.Nursery) -> None:
        """Go on with a client; one whose state makes no sense is cut off."""
        self._resumed = None
        try:
            sock = _connected(self._held.take(saved.stream.socket))
        except (VbusError, OSError) as error:
            self._log.warning("its client was not taken over: %s", error)
            return
        session = self._start(FdSocket(sock, wire.MAX_MSG_FDS), peer_of(sock), nursery)
        try:
            session.resume(saved, self._held)
        except (VbusError, OSError) as error:
            self._log.warning("its client cannot be taken over: %s", error)
            session.end()

    def pause(self) -> None:
        """Take no more messages of the client, be it one that attaches now."""
        self._paused = True
        if self._session is not None:
            self._session.pause()

    def unpause(self) -> None:
        """Go on taking messages."""
        self._paused = False
        if self._session is not None:
            self._session.unpause()

    @property
    def busy(self) -> bool:
        """Is a request of the client under way?"""
        return self._session is not None and self._session.busy

    def save(self, kept: Kept) -> SavedClient | None:
        """Give the paused client's state; None: there is none worth to be kept.

        Raises InvalidError: the function cannot be saved.
        """
        return None if self._session is None else self._session.save(kept)

    def _start(self, sock: FdSocket, peer: Peer, nursery: trio.Nursery) -> Session:
        self._counters.clients += 1
        self._at_attach = self._counters.frozen(peer, 0, 0)
        self._peer = peer
        self._client_socket = sock
        self._session = Session(
            self.function,
            sock,
            self._counters,
            self._log,
            allow_truncatable=self._allow_truncatable,
            spin_us=self._spin_us,
        )
        if self._paused:
            self._session.pause()
        nursery.start_soon(self._run, self._session)
        return self._session

    async def _run(self, session: Session) -> None:
        self._log.info("client connected: %s", self._peer)
        try:
            await session.run()
        except Exception:
            # Ours or the function's mistake; it must not reach the other guests.
            self._log.exception("serving the client failed")
        finally:
            if self._session is session:
                self._session = self._peer = self._client_socket = None
            self._log.info("client left")

    async def _refuse(self, sock: FdSocket, code: int) -> None:
        """Answer the first message with an error, so that the client knows why."""
        connection = wire.Connection()
        try:
            with trio.move_on_after(_REFUSAL_TIMEOUT_S), suppress(ProtocolError):
                while not await self._refuse_first(sock, connection, code):
                    await sock.wait_readable()
        finally:
            close_all(connection.abandon())
            sock.close()
            self._refusals -= 1

    async def _refuse_first(
        self, sock: FdSocket, connection: wire.Connection, code: int
    ) -> bool:
        received = sock.receive_nowait(connection.missing)
        if received is None:
            return False
        data, fds = received
        messages = connection.feed(data, fds)
        for message in messages:
            close_all(message.fds)
            sock.send(wire.error_reply(message, code))
        return bool(messages) or not data


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Puts the server's name before each line."""

    def __init__(self, name: str) -> None:
        super().__init__(logger)
        self._name = name

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{self._name}: {msg}", kwargs


def _connected(fd: int) -> socket.socket:
    """Own a socket of a client. Raises InvalidError for anything else, closed then."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise InvalidError("its connection is no unix socket")
    return sock


def _hung_up(sock: FdSocket) -> bool:
    """Has the client left, though its session may not have noticed yet?"""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
