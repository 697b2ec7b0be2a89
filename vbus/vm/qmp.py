"""QEMU's monitor (QMP) over a connected socket: commands and events.

`Protocol` is the codec and does no I/O; `Qmp` is its trio edge.
Spec: QEMU's docs/interop/qmp-spec.rst.
"""

import json
import math
from collections import deque
from typing import Any

import trio

from vbus.errors import ProtocolError
from vbus.vm.errors import GuestGoneError, QmpError

_MAX_LINE = 1 << 22
_RECEIVE_SIZE = 65536
_KEPT_EVENTS = 1000

Event = dict[str, Any]


class Protocol:
    """Bytes from QEMU in, answers and events out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Give the messages that are whole now. Raises ProtocolError."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise ProtocolError(f"QMP: a line of more than {_MAX_LINE} bytes")
        return [self._message(line) for line in lines if line.strip()]

    @staticmethod
    def _message(line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except ValueError:
            raise ProtocolError(f"QMP: not JSON: {line[:80]!r}") from None
        if not isinstance(message, dict):
            raise ProtocolError(f"QMP: not an object: {line[:80]!r}")
        return message

    @staticmethod
    def command(number: int, name: str, arguments: dict[str, Any]) -> bytes:
        message = {"execute": name, "arguments": arguments, "id": number}
        return json.dumps(message).encode() + b"\n"


class Qmp:
    """Commands, by any number of tasks, and events in the order they came."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._protocol = Protocol()
        self._waiting: dict[int, tuple[trio.Event, list[dict[str, Any]]]] = {}
        self._last_id = 0
        self._sending = trio.Lock()
        self._gone = False
        self._listeners: list[trio.MemorySendChannel[Event]] = []
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        """The events so far, the last 1000."""

    async def run(self) -> None:
        """Read until QEMU hangs up."""
        try:
            await self._read()
        finally:
            self._hang_up()

    async def negotiate(self) -> None:
        """Leave the mode in which QEMU takes no other command. Raises as `execute`."""
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: object) -> Any:
        """Give a command and its result; underscores in names stand for dashes.

        Raises QmpError (refused), GuestGoneError (QEMU ended).
        """
        self._last_id += 1
        number = self._last_id
        done, answer = self._waiting[number] = (trio.Event(), [])
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            if not self._gone:
                await self._send(Protocol.command(number, command, named))
                await done.wait()
        finally:
            del self._waiting[number]
        if not answer:
            raise GuestGoneError(f"QEMU ended before it answered {command}")
        if "error" in answer[0]:
            error = answer[0]["error"]
            raise QmpError(str(error.get("class")), f"{command}: {error.get('desc')}")
        return answer[0].get("return")

    async def wait_event(self, name: str) -> Event:
        """Wait for an event that comes from now on. Raises GuestGoneError."""
        send, receive = trio.open_memory_channel[Event](math.inf)
        if self._gone:
            send.close()
        else:
            self._listeners.append(send)
        try:
            async for event in receive:
                if event["event"] == name:
                    return event
        finally:
            if send in self._listeners:
                self._listeners.remove(send)
            send.close()
            receive.close()
        raise GuestGoneError(f"QEMU ended before the event {name}")

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[await self._sock.send(rest) :]
            except OSError:
                self._hang_up()

    async def _read(self) -> None:
        while True:
            try:
                data = await self._sock.recv(_RECEIVE_SIZE)
            except OSError:
                data = b""
            if not data:
                self._hang_up()
                return
            for message in self._protocol.feed(data):
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append(message)
            for listener in self._listeners:
                listener.send_nowait(message)
        elif message.get("id") in self._waiting:
            done, answer = self._waiting[message["id"]]
            answer.append(message)
            done.set()

    def _hang_up(self) -> None:
        self._gone = True
        for done, _ in self._waiting.values():
            done.set()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
