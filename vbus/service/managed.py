"""A daemon that runs under a manager: it obeys signals and says how it goes."""

import logging
import signal
from collections.abc import AsyncIterator

import trio

from vbus.daemon import Daemon
from vbus.service.notify import Notifier

logger = logging.getLogger(__name__)

_LEAST_BETWEEN_REPORTS_S = 1.0


async def run(daemon: Daemon, notifier: Notifier) -> None:
    """Run until SIGTERM or SIGINT; raises what `Daemon.run` does."""
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_on_signal, signals, daemon)
                nursery.start_soon(notifier.keep_alive)
                async with trio.open_nursery() as serving:
                    await serving.start(daemon.run)
                    notifier.ready()
                    nursery.start_soon(_report, daemon, notifier)
                    await daemon.stopped()
                    notifier.stopping()
                nursery.cancel_scope.cancel()
    finally:
        daemon.listeners.close()
        notifier.close()


async def _stop_on_signal(signals: AsyncIterator[int], daemon: Daemon) -> None:
    async for number in signals:
        logger.info("got %s", signal.Signals(number).name)
        daemon.stop()


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
