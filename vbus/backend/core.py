"""The daemon's end of the backend protocol, as a machine without I/O.

Takes bytes and gives what they mean; gives ids to requests, knows which are unanswered
and until when some must be answered. A backend is hostile until checked: whatever it
says that it could not know, or not yet, is a ProtocolError, and the connection is over.

    new --Hello--> up
    request: asked --Reply--> answered          once, whether anybody still waits or not
    connection: Open --> known --Reply to Close or End, or a refused Open--> forgotten
    device: Create --> known --Reply to Remove, or a refused Create--> forgotten
"""

from dataclasses import dataclass
from typing import Any

from vbus.backend import wire
from vbus.errors import ProtocolError

_READER = wire.decoder(wire.FromBackend)
PROMPT = (wire.Ping, wire.Map, wire.Unmap, wire.Forget, wire.End, wire.Count)
"""Requests without a device's own code in them: these have the deadline."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request of ours and the one reply to it."""

    request: wire.Request
    reply: wire.Reply


Event = wire.Hello | Answered | wire.Failed | wire.DeviceFailed | wire.Keep


class BackendCore:
    """One connection to a backend."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._frames = wire.Frames()
        self._fds = 0
        self._up = False
        self._last_id = 0
        self._asked: dict[int, tuple[wire.Request, float | None]] = {}
        self._connections: set[int] = set()
        self._devices: set[str] = set()

    @property
    def missing(self) -> int:
        """Bytes that the message under way still lacks."""
        return self._frames.missing

    @property
    def unanswered(self) -> int:
        """Requests without a reply so far."""
        return len(self._asked)

    def next_id(self) -> int:
        """Give the id for the next request."""
        self._last_id += 1
        return self._last_id

    def request(self, request: wire.Request, now: float, fds: int = 0) -> bytes:
        """Ask; gives the frame. Raises InvalidError if it cannot be said."""
        frame = wire.encode(request, fds)
        due = now + self._deadline_s if isinstance(request, PROMPT) else None
        self._asked[request.id] = (request, due)
        if isinstance(request, wire.Open):
            self._connections.add(request.connection)
        elif isinstance(request, wire.Create):
            self._devices.add(request.device)
        return frame

    def overdue(self, now: float) -> wire.Request | None:
        """Give a request whose deadline has passed, if there is one."""
        for request, due in self._asked.values():
            if due is not None and due <= now:
                return request
        return None

    def feed(self, data: bytes, fds: int = 0) -> list[Event]:
        """Take what came. Raises ProtocolError; nothing more may be fed then.

        Each `Keep` takes one of the descriptors, in their order.
        """
        self._fds += fds
        events = []
        for frame in self._frames.feed(data):
            event = self._take(wire.decode(frame.body, _READER))
            if frame.fds != (isinstance(event, wire.Keep) and event.comes):
                raise ProtocolError(f"a message that names {frame.fds} descriptors")
            self._fds -= frame.fds
            events.append(event)
        if not 0 <= self._fds <= self._frames.begun:
            raise ProtocolError("descriptors and messages do not match")
        return events

    def _take(self, message: Any) -> Event:
        if isinstance(message, wire.Hello):
            return self._hello(message)
        if not self._up:
            raise ProtocolError("the first message is no hello")
        if isinstance(message, wire.Reply):
            return self._reply(message)
        if isinstance(message, wire.Failed):
            if message.connection not in self._connections:
                raise ProtocolError(f"no connection {message.connection}")
            return message
        assert isinstance(message, wire.DeviceFailed | wire.Keep)
        if message.device not in self._devices:
            raise ProtocolError(f"no device {message.device!r}")
        return message

    def _hello(self, hello: wire.Hello) -> wire.Hello:
        if self._up:
            raise ProtocolError("a second hello")
        if hello.version != wire.VERSION:
            raise ProtocolError(
                f"version {hello.version}, but this daemon has {wire.VERSION}"
            )
        names = [info.name for info in hello.classes]
        if len(set(names)) != len(names):
            raise ProtocolError("two classes of one name")
        self._up = True
        return hello

    def _reply(self, reply: wire.Reply) -> Answered:
        try:
            request, _ = self._asked.pop(reply.id)
        except KeyError:
            raise ProtocolError(f"a reply to {reply.id}, which was not asked") from None
        if not isinstance(request, wire.Call) and reply.data:
            raise ProtocolError("data in a reply to what is no call")
        self._forget(request, refused=reply.result < 0)
        return Answered(request, reply)

    def _forget(self, request: wire.Request, *, refused: bool) -> None:
        """After this answer, is there still what the request was about?"""
        if isinstance(request, wire.Close | wire.End):
            self._connections.discard(request.connection)
        if refused and isinstance(request, wire.Open):
            self._connections.discard(request.connection)
        if refused and isinstance(request, wire.Create):
            self._devices.discard(request.device)
        if not refused and isinstance(request, wire.Remove):
            self._devices.discard(request.device)

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        assert all(0 < id <= self._last_id for id in self._asked)
        assert self._up or not (self._connections or self._devices)
