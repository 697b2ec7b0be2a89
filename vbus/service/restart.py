"""A daemon after a daemon: what the one leaves, and how the other comes by it.

    SIGUSR2   the daemon stops between two messages of its guests, writes down what it
              knows (`vbus.saved`) and executes itself: same process, same sockets
    killed    the service manager has the listening sockets, and the configuration as it
              was; guests come back by themselves

Both ways the next one gets descriptors as socket activation gives them, by name:
listening sockets, the state, and for SIGUSR2 those that the state counts up.
"""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple, NoReturn

import msgspec
import trio

from vbus import saved
from vbus.config import Config, from_document, to_document
from vbus.control.apply import running
from vbus.daemon import Daemon, Predecessor
from vbus.errors import BusyError, ConfigError, InvalidError
from vbus.saved import Held, Kept, Running, SavedBus, State
from vbus.service.inherited import FIRST, Inherited
from vbus.service.notify import Notifier

logger = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_STATE: Final = "vbus/state"
_STORED: Final = "vbus/state."
_HELD: Final = "h"
"""Short, as there may be thousands of them in one variable."""
_QUIET_S: Final = 10.0
_LOOK_S: Final = 0.002


# The next one


class Legacy(NamedTuple):
    """What came along: a predecessor and its configuration, if there was one.

    `stored` are names of states that the manager has; `rest` is not ours.
    """

    config: Config | None
    predecessor: Predecessor | None
    stored: tuple[str, ...]
    rest: list[Inherited]


def receive(inherited: Iterable[Inherited]) -> Legacy:
    """Take a predecessor's state out of what came along.

    A state that makes no sense is as good as none, with one line in the log.
    """
    passed = list(inherited)
    states = [one for one in passed if (one.name + ".").startswith(_STORED)]
    executed = any(one.name == _STATE for one in states)
    ours = [one for one in passed if one.name == _HELD and executed]
    rest = [one for one in passed if one not in states and one not in ours]
    held = Held([one.fd for one in ours])
    states.sort(key=lambda one: _generation(one.name))
    known = tuple(one.name for one in states if one.name != _STATE)
    try:
        state = saved.read(states[-1].fd) if states else None
        config = None if state is None else from_document(state.config)
    except (InvalidError, ConfigError) as error:
        logger.warning("starting anew: %s", error)
        state = config = None
    finally:
        for one in states:
            os.close(one.fd)
    if state is None or config is None:
        held.close()
        return Legacy(None, None, known, rest)
    config = msgspec.structs.replace(config, source="saved state")
    if state.running is not None:
        known = state.running.stored
    return Legacy(config, Predecessor(state.running, held), known, rest)


def _generation(name: str) -> int:
    """Order what the manager may have twice; who executed itself is the youngest."""
    number = name.removeprefix(_STORED)
    return int(number) if number.isdecimal() else sys.maxsize


# Leaving something for the case of a sudden end


class Memory:
    """The configuration as it is, at the service manager's."""

    def __init__(
        self, daemon: Daemon, notifier: Notifier, stored: tuple[str, ...] = ()
    ) -> None:
        """Replace what a predecessor has `stored` there, by name."""
        self.stored = stored
        self._daemon = daemon
        self._notifier = notifier
        self._known: dict[str, object] = {}

    async def keep(self) -> None:
        """Store it now and whenever it has changed, for ever."""
        changed = trio.Event()
        unwatch = self._daemon.watch(lambda _: changed.set())
        try:
            while True:
                changed = trio.Event()
                self._store()
                await changed.wait()
        finally:
            unwatch()

    def _store(self) -> None:
        document = to_document(running(self._daemon))
        if document == self._known:
            return
        try:
            fd = saved.write(State(document))
        except OSError as error:
            logger.warning("the state cannot be saved: %s", error)
            return
        latest = max(map(_generation, self.stored), default=0)
        name = f"{_STORED}{max(time.time_ns(), latest + 1)}"
        try:
            self._notifier.store(name, fd)
        finally:
            os.close(fd)
        self.forget()
        self._known, self.stored = document, (name,)

    def forget(self) -> None:
        """Leave nothing: whoever comes next starts from its file."""
        for name in self.stored:
            self._notifier.forget(name)
        self.stored = ()


# Executing itself


async def replace(daemon: Daemon, notifier: Notifier, memory: Memory) -> None:
    """Go on as a new process image; returns only if that cannot be, and says why."""
    if not await _can_start():
        logger.error("not replaced: what is installed now does not start")
        return
    for exposed in daemon.exposed.values():
        if exposed.server.attached:
            logger.error("not replaced: %s has a guest that cannot wait", exposed.name)
            return
    try:
        with daemon.closed() as quiet:
            servers = [guest.server for guest in daemon.guests.values()]
            for server in servers:
                server.pause()
            if await _wait_until(lambda: quiet() and not _busy(daemon)):
                await _leave(daemon, notifier, memory)
            for server in servers:
                server.unpause()
    except BusyError as error:
        logger.error("not replaced: %s", error)
    else:
        logger.error("not replaced: a device was busy for %s s", _QUIET_S)


async def _can_start() -> bool:
    """Try what would be executed: an upgrade gone wrong must not cost the guests."""
    words = sys.orig_argv[1:]
    if "serve" not in words:
        return False  # somebody's own program: who knows what it would do
    tried = await trio.run_process(
        [sys.executable, *words[: words.index("serve") + 1], "--help"],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return tried.returncode == 0


def _busy(daemon: Daemon) -> bool:
    return any(guest.server.busy for guest in daemon.guests.values())


async def _wait_until(condition: Callable[[], bool]) -> bool:
    with trio.move_on_after(_QUIET_S):
        while not condition():  # noqa: ASYNC110 - no hook that ends tells anybody
            await trio.sleep(_LOOK_S)
    return condition()


async def _leave(daemon: Daemon, notifier: Notifier, memory: Memory) -> None:
    """Unplug what cannot go on, and execute; never returns."""
    logger.info("being replaced")
    notifier.reloading()
    document = to_document(running(daemon))
    await daemon.backends.stop()
    unplugged = [
        device
        for device in reversed(tuple(daemon.model.devices.values()))
        if not device.resumable() and list(daemon.model.links(device))
    ]
    for device in unplugged:
        for bus, _ in list(daemon.model.links(device)):
            daemon.model.unlink(bus.name, device.name)
    await _wait_until(
        lambda: not (_busy(daemon) or any(one.connections for one in unplugged))
    )
    for device in unplugged:
        with suppress(BusyError):
            daemon.model.remove_device(device.name)
    await trio.lowlevel.checkpoint()
    kept = Kept()
    fd = saved.write(State(document, _running(daemon, kept, memory.stored)))
    _execute(
        [
            *daemon.listeners.all(),
            Inherited(_STATE, fd),
            *(Inherited(_HELD, one) for one in kept.fds),
        ],
        notifier.environment,
    )


def _running(daemon: Daemon, kept: Kept, stored: tuple[str, ...]) -> Running:
    lock = kept.keep(daemon.lock)
    clients = {name: guest.server.save(kept) for name, guest in daemon.guests.items()}
    buses = {
        name: SavedBus(
            bus.next_id, {one.name: one.id for one in bus.interfaces.values()}
        )
        for name, bus in daemon.model.buses.items()
    }
    guests = {name: one for name, one in clients.items() if one is not None}
    descriptors = {name: kept.keep(fd) for name, fd in daemon.descriptors.items()}
    return Running(lock, buses, guests, descriptors, stored)


def _execute(passed: list[Inherited], environment: Mapping[str, str]) -> NoReturn:
    """Execute this program anew with descriptors from 3 on, and nothing else."""
    # A signal that comes now waits for its handler, which is there soon again.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    above = FIRST + len(passed)
    fds = [fcntl.fcntl(one.fd, fcntl.F_DUPFD_CLOEXEC, above) for one in passed]
    for at, fd in enumerate(fds, FIRST):
        os.dup2(fd, at)
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        {
            **os.environ,
            **environment,
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": ":".join(one.name for one in passed),
        },
    )
