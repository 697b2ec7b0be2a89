"""The host's end of the channel to the guest's agent (`guest/agent.py`).

One JSON object a line. To the guest: start, python, signal, end, put, each with the
boot's name, so that what was meant for a guest before a reset is not done after it.
From it: up (the agent runs, with the boot's name), started, out, err, result, ended,
done, failed. Bytes are base64.
"""

import base64
import json
import math
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

import trio

from vbus.vm.errors import GuestError, GuestGoneError

_RECEIVE_SIZE = 1 << 18
Message = dict[str, Any]


class GuestProcess:
    """A program that runs in the guest; iterate over it for its lines of stdout."""

    def __init__(self, channel: "Channel", number: int, what: str) -> None:
        self._channel = channel
        self._number = number
        self.what = what
        self.pid = 0
        self.status: int | None = None
        self.stderr = b""
        """What it has written to stderr so far."""
        self.result = b""
        self._send, self._receive = trio.open_memory_channel[bytes](math.inf)
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._changed = trio.Event()
        self._failure: Exception | None = None

    def __aiter__(self) -> "GuestProcess":
        return self

    async def __anext__(self) -> str:
        while not self._lines:
            try:
                data = await self._receive.receive()
            except trio.EndOfChannel:
                if self._failure is not None and not self._rest:
                    raise self._failure from None
                if not self._rest:
                    raise StopAsyncIteration from None
                data = b"\n"
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft().decode(errors="replace")

    async def output(self) -> bytes:
        """Give the stdout that has not been taken as lines, until its end."""
        data = b"".join([part async for part in self._receive])
        if self._failure is not None:
            raise self._failure
        return data

    async def wait(self) -> int:
        """Wait for its end, and give its status: negative for a signal.

        Raises GuestGoneError (the guest left or was reset), GuestError.
        """
        while self.status is None:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()
        return self.status

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal, unless it has ended."""
        self._channel.send("signal", self._number, signal=int(number))

    def end(self) -> None:
        """Kill it and what it started."""
        if self.status is None and self._failure is None:
            self._channel.send("end", self._number)

    async def started(self) -> None:
        while not self.pid and self._failure is None:
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    def take(self, message: Message) -> None:
        match message["op"]:
            case "started":
                self.pid = message["pid"]
            case "out":
                self._send.send_nowait(base64.b64decode(message["data"]))
            case "err":
                self.stderr += base64.b64decode(message["data"])
            case "result":
                self.result += base64.b64decode(message["data"])
            case "ended":
                self.status = message["status"]
            case "done":
                self.status = 0
            case "failed":
                self._failure = GuestError(f"{self.what}: {message['error']}")
        self._notify()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._notify()

    @property
    def over(self) -> bool:
        return self.status is not None or self._failure is not None

    def _notify(self) -> None:
        if self.over:
            self._send.close()
        self._changed.set()
        self._changed = trio.Event()


class Channel:
    """Requests to the agent, and what comes of them."""

    def __init__(self, sock: trio.socket.SocketType, why: Callable[[], str]) -> None:
        self._sock = sock
        self._why = why
        self._boot = ""
        self._last = 0
        self._jobs: dict[int, GuestProcess] = {}
        self._out, self._queued = trio.open_memory_channel[bytes](math.inf)
        self._ups, self._next_up = trio.open_memory_channel[float](math.inf)
        self._gone: Exception | None = None

    async def run(self) -> None:
        """Carry messages until QEMU hangs up."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            await self._read()
            nursery.cancel_scope.cancel()

    async def wait_up(self) -> float:
        """Wait for the next boot that was not waited for; give the guest's uptime.

        Raises GuestGoneError.
        """
        try:
            return await self._next_up.receive()
        except trio.EndOfChannel:
            assert self._gone is not None
            raise self._gone from None

    def request(self, op: str, what: str, **about: object) -> GuestProcess:
        """Ask for a job. Raises GuestGoneError."""
        if self._gone is not None:
            raise self._gone
        self._last += 1
        job = self._jobs[self._last] = GuestProcess(self, self._last, what)
        self.send(op, self._last, **about)
        return job

    def send(self, op: str, number: int, **about: object) -> None:
        """Put a message in line; one that nobody can take any more is dropped."""
        message = {"op": op, "id": number, "boot": self._boot, **about}
        self._out.send_nowait(json.dumps(message).encode() + b"\n")

    def give_up(self, error: Exception) -> None:
        """Fail all that waits for the guest, now and later."""
        if self._gone is None:
            self._gone = error
            self._ups.close()
            self._fail_jobs(error)

    async def _write(self) -> None:
        async for data in self._queued:
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[await self._sock.send(rest) :]
            except OSError:
                return  # the reader finds out, and says so

    async def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = await self._sock.recv(_RECEIVE_SIZE)
            except OSError:
                return
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return  # cut off by a reset
        if message["op"] == "up":
            self._fail_jobs(GuestGoneError(f"the guest was reset{self._why()}"))
            self._boot = message["boot"]
            if self._gone is None:
                self._ups.send_nowait(message["uptime_s"])
            return
        job = self._jobs.get(message["id"])
        if job is not None:
            job.take(message)
            if job.over:
                del self._jobs[message["id"]]

    def _fail_jobs(self, error: Exception) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.fail(error)
