"""A guest that never rests: run by tests as busy.py SOCKET ECHO VENET ADDRESS.

It calls the echo device and moves messages through its rings, has the venet as an
interface with that address, and comes back whenever its host went. One line for each
hundredth of a second at work: how often it attached, how many answers it has had.
"""

import sys
import time
from functools import partial

import trio

from proxy.again import returning
from proxy.drivers.echo import EchoDriver
from proxy.guest import attach
from proxy.registry import DriverHost, Report, State
from proxy.tasks import beside

PATIENCE_S = 60
BETWEEN_LINES_S = 0.01


class Busy:
    def __init__(self, echo: str, venet: str, address: str) -> None:
        self.lives = self.answers = 0
        self._echo, self._venet, self._address = echo, venet, address
        self._said = 0.0

    async def live(self, socket: str) -> None:
        running: set[str] = set()
        both = trio.Event()

        def note(report: Report) -> None:
            if report.state is State.RUNNING:
                running.add(report.device.name)
            if running == {self._echo, self._venet}:
                both.set()

        async with attach(socket, memory_mib=8) as bridge:
            options = {self._venet: {"address": self._address}}
            drivers = DriverHost(bridge, options=options, report=note)
            async with beside(drivers.run):
                await both.wait()
                self.lives += 1
                driver = drivers.drivers[self._echo]
                assert isinstance(driver, EchoDriver)
                while True:
                    await self._work(driver)

    async def _work(self, driver: EchoDriver) -> None:
        message = self.answers.to_bytes(8, "little") * 64
        assert await driver.exchange(message) == message
        assert (await driver.device.call(0, message))[1] == message
        self.answers += 1
        now = time.monotonic()
        if now - self._said >= BETWEEN_LINES_S:
            self._said = now
            print(self.lives, self.answers, now, flush=True)
        await trio.sleep(0.001)


def main(socket: str, echo: str, venet: str, address: str) -> None:
    busy = Busy(echo, venet, address)
    trio.run(returning, partial(busy.live, socket), PATIENCE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
