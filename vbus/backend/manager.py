"""All backends of a daemon: those it starts itself, and those that come to its socket.

supervised   `start = true`: a child with a socket of its own; a second one is started
             beside it and waits to take over at once when it ends. Replaced later and
             later when it ends again and again, and given up when that is too often
others       connect to backends.sock, as root or as the daemon's own user, under
             the name of a configured backend or one of their own
"""

import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from vbus import isolation
from vbus.backend import wire
from vbus.backend.backend import Backend, State, Tell
from vbus.backend.backoff import Backoff
from vbus.backend.child import Child
from vbus.backend.link import BackendLink
from vbus.backend.process import Process
from vbus.bus import BusModel, check_name
from vbus.config import BackendConfig, DeviceConfig
from vbus.errors import BusyError, InvalidError, NotFoundError, VbusError
from vbus.sockets import listen, peer_of, unlinker
from vbus.vfio_user.transport import FdSocket

log = logging.getLogger(__name__)

FD_VARIABLE = "VBUS_BACKEND_FD"
DEADLINE_S = 2.0
_HELLO_S = 5.0
_START_S = 30.0
_CLIENT_LIMIT = 256
_ACCEPT_PAUSE_S = 0.1


class _Supervised:
    """What the supervisor knows of one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.backoff = Backoff(backend.config.restart_limit)
        self.again = trio.Event()
        self.tried = trio.Event()
        """The first attempt came up, or failed."""
        self.standby: Child | None = None
        """What has started already, to take over at once."""


class Backends:
    """The backends of one daemon."""

    def __init__(
        self,
        configs: Sequence[BackendConfig],
        runtime_dir: Path,
        model: BusModel,
        tell: Tell,
    ) -> None:
        self.named = {one.name: Backend(one, model, tell) for one in configs}
        self._runtime_dir = runtime_dir
        self._model = model
        self._tell = tell
        self._allowed = {0, os.geteuid()}
        self._clients = 0
        self._nursery: trio.Nursery
        self._serving = trio.CancelScope()
        self._ended = trio.Event()
        self._supervised = {
            one.name: _Supervised(self.named[one.name]) for one in configs if one.start
        }

    @property
    def path(self) -> Path:
        return self._runtime_dir / "backends.sock"

    def backend(self, name: str) -> Backend:
        """Give a backend. Raises NotFoundError."""
        try:
            return self.named[name]
        except KeyError:
            raise NotFoundError(f"no backend {name!r}") from None

    def of_class(self, device: DeviceConfig) -> Backend | None:
        """Give where to make a device: None is this very process.

        The backend it names, else the first that has its class. Raises NotFoundError,
        and InvalidError for what only this process can do.
        """
        backend = self._backend_of(device)
        if backend is not None and device.exposure is not None:
            raise InvalidError(
                f"{device.name} lives in backend {backend.name}, and only devices of"
                ' the daemon itself can have expose = "pci"'
            )
        return backend

    def _backend_of(self, device: DeviceConfig) -> Backend | None:
        if device.backend:
            return self.backend(device.backend)
        for backend in self.named.values():
            if backend.has(device.class_name):
                return backend
        return None

    def of_device(self, name: str) -> Backend | None:
        """Give whose device this is, or shall be."""
        for backend in self.named.values():
            if name in backend.wanted:
                return backend
        return None

    async def serve(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Start what is to be started and listen, until cancelled.

        Started when the socket is there. Raises what `vbus.sockets.listen` does.
        """
        listener = listen(self.path)
        unlink = unlinker(self.path)
        try:
            with self._serving:
                async with trio.open_nursery() as self._nursery:
                    for one in self._supervised.values():
                        self._nursery.start_soon(self._supervise, one)
                    task_status.started()
                    while True:
                        await self._accept(listener, self._nursery)
        finally:
            for backend in self.named.values():
                backend.let_go()
            listener.close()
            unlink()
            self._ended.set()

    async def stop(self) -> None:
        """End `serve`: all processes have ended, and their devices are gone."""
        self._serving.cancel()
        await self._ended.wait()

    async def tried(self) -> None:
        """Wait until each backend of ours is up, or has failed to come up once."""
        for one in self._supervised.values():
            await one.tried.wait()

    async def restart(self, name: str) -> None:
        """Have a new process take over from a backend's, and wait until it did.

        It is started before the old one ends, from what is installed now. Raises
        BusyError if the daemon does not start it, VbusError if it does not come up: if
        it says no hello, the old one stays.
        """
        backend = self.backend(name)
        one = self._supervised.get(name)
        if one is None:
            raise BusyError(f"backend {name} is not started by this daemon")
        if backend.link is not None and await self._renewed(one):
            return
        one.backoff.forget()
        one.tried = trio.Event()
        one.again.set()
        if backend.link is not None:
            backend.link.process.kill()
        await one.tried.wait()
        if backend.state is not State.UP:
            raise VbusError(f"backend {name} did not come up: {backend.last_end}")

    async def _renewed(self, one: _Supervised) -> bool:
        """Replace the process that waits by one of what is installed now.

        True if that works already: the one before it has ended meanwhile.
        """
        backend = one.backend
        old, child = one.standby, self._start(one)
        one.standby = child
        if old is not None:
            old.kill()
        if child is None:
            raise VbusError(f"backend {backend.name}: {backend.last_end}")
        await child.greeted.wait()
        if child.turn.is_set():
            await child.settled.wait()
        if child.ended.is_set():
            raise VbusError(f"backend {backend.name} did not come up: {child.reason}")
        return child.turn.is_set()

    async def count(self) -> None:
        """Bring all devices' statistics up to date; one that hangs keeps its old."""
        async with trio.open_nursery() as nursery:
            for backend in self.named.values():
                if backend.link is not None:
                    nursery.start_soon(self._count, backend)

    async def _count(self, backend: Backend) -> None:
        try:
            await backend.count()
        except VbusError as error:
            log.warning("backend %s: no statistics: %s", backend.name, error)

    # Those of our own

    async def _supervise(self, one: _Supervised) -> None:
        while True:
            one.again = trio.Event()
            lived = await self._live(one)
            if not one.again.is_set():
                await self._pause(one, one.backoff.ended(lived))

    async def _live(self, one: _Supervised) -> float:
        """Have a process work until it ends: how long it was up, in seconds."""
        child = one.standby
        if child is None or child.ended.is_set():
            child = self._start(one)
        one.standby = None
        if child is None:
            return 0.0
        child.turn.set()
        await child.settled.wait()
        if child.ended.is_set():
            return 0.0
        one.tried.set()
        began = trio.current_time()
        if one.standby is None:
            one.standby = self._start(one)
        await child.ended.wait()
        return trio.current_time() - began

    async def _pause(self, one: _Supervised, delay: float | None) -> None:
        """Wait before the next process; `delay` None: until somebody asks for it."""
        backend = one.backend
        if delay is None:
            log.error("backend %s is given up: %s", backend.name, backend.last_end)
            backend.give_up()
            if one.standby is not None:
                one.standby.kill()
        one.tried.set()
        with trio.move_on_after(math.inf if delay is None else delay):
            await one.again.wait()
        backend.state = State.DOWN

    def _start(self, one: _Supervised) -> Child | None:
        """Start a process that says hello and waits for its turn; None: it cannot."""
        backend = one.backend
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fd_socket = FdSocket(ours, wire.MAX_FDS)
        try:
            process = self._spawn(backend.config, theirs)
        except OSError as error:
            fd_socket.close()
            backend.last_end = f"cannot start {backend.config.command}: {error}"
            log.warning("backend %s: %s", backend.name, backend.last_end)
            return None
        finally:
            theirs.close()
        log.info("backend %s: started as process %d", backend.name, process.pid)
        link = BackendLink(
            backend.name,
            fd_socket,
            Process.child(process.pid),
            deadline_s=backend.config.deadline_s,
            hello_s=_START_S,
        )
        child = Child(backend, link, process)
        self._nursery.start_soon(child.run)
        return child

    def _spawn(
        self, config: BackendConfig, theirs: socket.socket
    ) -> "subprocess.Popen[bytes]":
        missing = isolation.missing()
        if config.isolation == "required" and missing:  # say it where it is seen
            raise OSError(f"isolation is required, but {missing}")
        command = config.command or (
            *(sys.executable, "-m", "vbus", "backend", "run"),
            *("--name", config.name, *config.classes),
        )
        environment = {
            **os.environ,
            FD_VARIABLE: str(theirs.fileno()),
            "VBUS_RUNTIME_DIR": str(self._runtime_dir),
        }
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
            # Out of reach of the terminal's Ctrl-C. Not in a session of its own: Linux
            # shares cores out between sessions first (autogroups), and a backend that
            # wakes has to wait its turn behind all processes of the daemon's.
            process_group=0,
        )

    # Those that come

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, or it is gone already
            log.warning("backends' socket: %s", error)
            await trio.sleep(_ACCEPT_PAUSE_S)
            return
        pid, uid, _ = peer_of(sock)
        if uid not in self._allowed or self._clients >= _CLIENT_LIMIT:
            log.warning("backend of process %d, uid %d refused", pid, uid)
            sock.close()
            return
        nursery.start_soon(self._serve_stranger, sock)

    async def _serve_stranger(self, sock: socket.socket) -> None:
        self._clients += 1
        process = Process.peer(sock)
        link = BackendLink(
            f"of process {process.pid}",
            FdSocket(sock, wire.MAX_FDS),
            process,
            deadline_s=DEADLINE_S,
            hello_s=_HELLO_S,
        )
        backend: Backend | None = None

        async def up(hello: wire.Hello) -> None:
            nonlocal backend
            backend = self._backend_for(hello)
            await backend.came_up(link, hello)

        def device_failed(device: str, message: str) -> None:
            if backend is not None:
                backend.device_failed(device, message)

        reason = ""
        try:
            reason = await link.serve(up, device_failed)
        finally:
            self._clients -= 1
            if backend is not None:
                backend.went_down(link, reason)
                self._forget_unused(backend)
        log.warning("backend %s ended: %s", link.name, reason)

    def _backend_for(self, hello: wire.Hello) -> Backend:
        """Find or make the backend that a process wants to be."""
        name = hello.name
        check_name(name)
        if name in self._supervised:
            raise BusyError(f"backend {name} is started by the daemon itself")
        backend = self.named.get(name)
        if backend is None:
            if not hello.classes:
                raise InvalidError(f"backend {name} has no classes")
            config = BackendConfig(name, start=False)
            backend = self.named[name] = Backend(config, self._model, self._tell)
        return backend

    def _forget_unused(self, backend: Backend) -> None:
        """Forget who came by itself and left nothing behind."""
        ours = backend.config.classes
        if not (ours or backend.wanted or backend.link):
            self.named.pop(backend.name, None)
