"""A daemon that runs under a manager: it obeys signals and says how it goes."""

import logging
import signal
from collections.abc import AsyncIterator

import trio

from vbus.daemon import Daemon
from vbus.service.notify import Notifier
from vbus.service.restart import SIGNALS, Memory, replace

logger = logging.getLogger(__name__)

_LEAST_BETWEEN_REPORTS_S = 1.0


async def run(daemon: Daemon, notifier: Notifier, stored: tuple[str, ...] = ()) -> None:
    """Run until SIGTERM or SIGINT; raises what `Daemon.run` does.

    SIGUSR2 replaces the process image under the guests. `stored` are the names of
    states that the manager has of us.
    """
    memory = Memory(daemon, notifier, stored)
    try:
        with trio.open_signal_receiver(*SIGNALS) as signals:
            # Who executed this process anew has blocked them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_obey, signals, daemon, notifier, memory)
                nursery.start_soon(notifier.keep_alive)
                async with trio.open_nursery() as serving:
                    await serving.start(daemon.run)
                    notifier.ready()
                    async with trio.open_nursery() as telling:
                        telling.start_soon(_report, daemon, notifier)
                        if notifier.connected:
                            telling.start_soon(memory.keep)
                        await daemon.stopped()
                        telling.cancel_scope.cancel()
                    memory.forget()
                    notifier.stopping()
                nursery.cancel_scope.cancel()
    finally:
        daemon.listeners.close()
        notifier.close()


async def _obey(
    signals: AsyncIterator[int], daemon: Daemon, notifier: Notifier, memory: Memory
) -> None:
    """SIGUSR2 is for one who is up; SIGTERM goes first, whatever else is under way."""
    async with trio.open_nursery() as replacing:
        async for number in signals:
            logger.info("got %s", signal.Signals(number).name)
            if number != signal.SIGUSR2:
                replacing.cancel_scope.cancel()
                daemon.stop()
                break
            if daemon.ready:
                replacing.start_soon(replace, daemon, notifier, memory)
    async for number in signals:
        logger.info("got %s, and is stopping already", signal.Signals(number).name)


async def _report(daemon: Daemon, notifier: Notifier) -> None:
    """Keep the manager's status line true; it may lag behind by a second."""
    changed = trio.Event()
    unwatch = daemon.watch(lambda _: changed.set())
    try:
        while True:
            changed = trio.Event()
            guests = daemon.guests.values()
            attached = sum(guest.bridge.attached for guest in guests)
            notifier.status(
                f"{attached} of {len(guests)} guests attached,"
                f" {len(daemon.model.devices)} devices."
            )
            await changed.wait()
            await trio.sleep(_LEAST_BETWEEN_REPORTS_S)
    finally:
        unwatch()
