"""HTTP for one page, /metrics: over a unix socket, and over TCP if so configured.

A scraper can take its time and break every rule at no cost but its own: the number of
connections (the oldest gives way), each request's size and each connection's life are
limited, one text serves all who ask within half a second, and it is put together in a
thread.
"""

import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h11
import trio

from vbus.control.statistics import (
    counted,
    function_sources,
    guest_sources,
    meter,
    sources,
)
from vbus.errors import BusyError, InvalidError
from vbus.metrics.sample import Sample
from vbus.sockets import Access, listen, unlinker

if TYPE_CHECKING:
    from vbus.daemon import Daemon

CONNECTION_LIMIT = 16
CONNECTION_LIFE_S = 10
REQUEST_LIMIT = 8192
FRESH_S = 0.5
_AT_A_TIME = 32
_ACCEPT_PAUSE_S = 0.1
_PLAIN = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


def address_of(text: str) -> tuple[str, int]:
    """Take "127.0.0.1:9469" or "[::1]:9469" apart. Raises InvalidError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 0xFFFF:
        raise InvalidError(f"metrics: {text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _render(samples: Sequence[Sample]) -> bytes:
    # Its imports are a sixth of the daemon's start, which guests may wait for.
    from vbus.metrics.exposition import render

    return render(samples)


class Metrics:
    """The text, made when it is asked for and kept for a moment."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self._lock = trio.Lock()
        self._text = b""
        self._made_at = float("-inf")

    async def text(self) -> bytes:
        """Give the text. The daemon's other tasks run meanwhile."""
        async with self._lock:
            if trio.current_time() - self._made_at >= FRESH_S:
                await self._daemon.backends.count()
                samples = []
                for sample in self._samples():
                    samples.append(sample)
                    if len(samples) % _AT_A_TIME == 0:
                        await trio.lowlevel.checkpoint()
                self._text = await trio.to_thread.run_sync(_render, samples)
                self._made_at = trio.current_time()
            return self._text

    def _samples(self) -> Iterator[Sample]:
        """Give everything's statistics; what goes meanwhile is left out."""
        daemon, model = self._daemon, self._daemon.model
        yield Sample("daemon", {}, counted(sources(daemon)["daemon"]))
        for name, bus in list(model.buses.items()):
            yield Sample("bus", {"bus": name}, counted(bus.statistics))
        for name, device in list(model.devices.items()):
            if model.devices.get(name) is device:
                labels = {"device": name, "class": model.class_name(device)}
                yield Sample("device", labels, counted(device.statistics))
                yield Sample("device_bus", labels, meter(device))
        for name, exposed in daemon.exposed.items():
            labels = {"device": name, "layout": exposed.config.layout}
            yield Sample("function", labels, {"attached": exposed.server.attached})
            for part, source in function_sources(exposed).items():
                kind = "function" if part == "function" else f"function_{part}"
                yield Sample(kind, labels, counted(source))
        for name, backend in list(daemon.backends.named.items()):
            link, labels = backend.link, {"backend": name}
            yield Sample("backend", labels, {"up": link is not None})
            if link is not None:
                yield Sample("backend", labels, counted(link.statistics))
        for name, guest in daemon.guests.items():
            labels = {"guest": name, "bus": guest.bus.name}
            yield Sample("guest", labels, {"attached": guest.bridge.attached})
            for part, source in guest_sources(guest).items():
                yield Sample(f"guest_{part}", labels, counted(source))


class MetricsServer:
    """Serves the metrics of a daemon until cancelled."""

    def __init__(self, daemon: "Daemon") -> None:
        self._metrics = Metrics(daemon)

    async def serve_unix(
        self,
        path: Path,
        access: Access,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve on a unix socket. Raises what `vbus.sockets.listen` does."""
        listener = listen(path)
        unlink = unlinker(path)
        try:
            access.grant(path)
            await self._serve(listener, access.allows, task_status)
        finally:
            unlink()

    async def serve_tcp(
        self,
        address: tuple[str, int],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve whoever reaches the address. Raises BusyError, OSError."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            listener = socket.create_server(address, family=family)
        except OSError as error:
            where = f"{address[0]} port {address[1]}"
            raise BusyError(f"no metrics on {where}: {error.strerror}") from None
        logger.info("metrics on http://%s:%d/metrics", *listener.getsockname()[:2])
        listener.setblocking(False)
        await self._serve(listener, lambda _: True, task_status)

    async def _serve(
        self,
        listener: socket.socket,
        allows: Callable[[trio.socket.SocketType], bool],
        task_status: trio.TaskStatus[None],
    ) -> None:
        living: deque[trio.CancelScope] = deque()
        with trio.socket.from_stdlib_socket(listener) as sock:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    try:
                        client, _ = await sock.accept()
                    except OSError as error:  # out of descriptors, or it left already
                        logger.warning("metrics: %s", error)
                        await trio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    if not allows(client):
                        client.close()
                        continue
                    if len(living) == CONNECTION_LIMIT:
                        living.popleft().cancel()
                    scope = trio.CancelScope(relative_deadline=CONNECTION_LIFE_S)
                    living.append(scope)
                    nursery.start_soon(self._answer, client, scope, living)

    async def _answer(
        self,
        client: trio.socket.SocketType,
        scope: trio.CancelScope,
        living: deque[trio.CancelScope],
    ) -> None:
        try:
            with client, scope:
                await answer(client, self._metrics.text)
        except OSError as error:
            logger.debug("metrics: a client is gone: %r", error)
        except Exception:
            logger.exception("metrics: a request failed")
        finally:
            if scope in living:
                living.remove(scope)


async def answer(
    sock: trio.socket.SocketType, text: Callable[[], Awaitable[bytes]]
) -> None:
    """Answer one request, and close. Raises OSError if the client leaves."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_LIMIT)
    try:
        request = await _request(sock, http)
    except h11.RemoteProtocolError as error:
        await _send(sock, http, error.error_status_hint, f"{error}\n".encode(), _PLAIN)
        return
    if request is None:
        return
    status, body, kind = 200, b"", _METRICS
    if request.target.partition(b"?")[0] != b"/metrics":
        status, body, kind = 404, b"only /metrics is here\n", _PLAIN
    elif request.method not in (b"GET", b"HEAD"):
        status, body, kind = 405, b"only GET and HEAD\n", _PLAIN
    else:
        body = await text()
    await _send(sock, http, status, body, kind, head=request.method == b"HEAD")


async def _request(
    sock: trio.socket.SocketType, http: h11.Connection
) -> h11.Request | None:
    """Read the request's head; None if the client leaves."""
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        http.receive_data(await sock.recv(REQUEST_LIMIT))


async def _send(
    sock: trio.socket.SocketType,
    http: h11.Connection,
    status: int,
    body: bytes,
    kind: str,
    *,
    head: bool = False,
) -> None:
    headers = [
        ("content-type", kind),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    data = http.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        data += http.send(h11.Data(data=body)) or b""
    left = memoryview(data)
    while left:
        left = left[await sock.send(left) :]
    sock.shutdown(trio.socket.SHUT_WR)
