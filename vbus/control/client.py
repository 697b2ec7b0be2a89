"""The other end of the control socket: what the command line and scripts use."""

import errno
import os
import socket
from collections import deque
from typing import Any, Self

import trio

from vbus.control import wire
from vbus.errors import ProtocolError, UnreachableError, class_of

_RECEIVE_SIZE = 65536


class ControlClient:
    """One connection to a daemon, for one task at a time.

    async with ControlClient(path) as control:
        devices = await control.request("device.show")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._frames = wire.Frames()
        self._answers = wire.Answers()
        self._bodies: deque[bytes] = deque()
        self._last_id = 0

    async def __aenter__(self) -> Self:
        """Connect. Raises UnreachableError."""
        self._sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await self._sock.connect(self._path)
        except OSError as error:
            self._sock.close()
            reason = error.strerror or str(error)
            raise UnreachableError(f"no daemon at {self._path}: {reason}") from None
        except BaseException:
            self._sock.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sock.close()

    async def request(self, op: str, **args: object) -> Any:
        """Ask, and give the result. If cancelled, close the connection.

        Raises the VbusError of the daemon's refusal, UnreachableError if the daemon
        leaves, ProtocolError.
        """
        await self._ask(op, args)
        return (await self._answer()).result

    def events(self, *, tree: bool = False) -> "Events":
        """Give every change from now on; the connection is for nothing else then.

        First comes {"event": "start"}, or with `tree` {"event": "tree", ...}: all there
        is at that moment, as `vbus tree --json` shows it. Nothing is lost in between.
        A reader that is too slow is told its losses: {"event": "lost", "count": n}.
        """
        return Events(self, tree=tree)

    async def next_event(self) -> dict[str, object]:
        """Wait for one more event, after the request for a stream.

        Raises as `request`.
        """
        while True:
            event = (await self._answer()).event
            if event is not None:
                return event

    async def _ask(self, op: str, args: dict[str, object]) -> None:
        self._last_id += 1
        request = wire.Request(wire.VERSION, self._last_id, op, args)
        data = memoryview(wire.encode(request))
        try:
            while data:
                data = data[await self._sock.send(data) :]
        except OSError:
            pass  # hung up on: what it said before, if anything, says why

    async def _answer(self) -> wire.Answer:
        answer = None
        while answer is None:
            answer = self._answers.take(await self._body())
        if answer.error is not None:
            number = getattr(errno, answer.error.errno, errno.EIO)
            raise class_of(number)(answer.error.message)
        if answer.id != self._last_id:
            raise ProtocolError(f"answer {answer.id} to request {self._last_id}")
        return answer

    async def _body(self) -> bytes:
        while not self._bodies:
            try:
                data = await self._sock.recv(_RECEIVE_SIZE)
            except OSError:
                data = b""
            if not data:
                raise UnreachableError(f"the daemon at {self._path} hung up")
            self._bodies.extend(self._frames.feed(data))
        return self._bodies.popleft()


class Events:
    """The stream of changes, as an async iterator; it starts when first asked."""

    def __init__(self, client: ControlClient, *, tree: bool) -> None:
        self._client = client
        self._tree = tree
        self._started = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, object]:
        if self._started:
            return await self._client.next_event()
        started = await self._client.request("events", tree=self._tree)
        self._started = True
        if self._tree:
            return {"event": "tree", **started["tree"]}
        return {"event": "start"}
