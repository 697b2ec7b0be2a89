"""Guests come, use everything and are killed: nothing of them stays."""

import os
import signal
from pathlib import Path

import trio

from proxy.guest import attach
from proxy.registry import DriverHost, Report, State
from tests.netns import isolated
from tests.system.served import Served
from tests.system.test_hostile import settled

ROUNDS = 200
CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "port0"
class = "venet"
bus = "bus0"
switch = "lan0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


async def use(socket: Path) -> None:
    """Attach, start all drivers (with a TAP), move data, and kill ourselves."""
    async with attach(socket, memory_mib=16) as bridge:
        running = trio.Event()
        started: set[str] = set()

        def note(report: Report) -> None:
            if report.state is State.RUNNING:
                started.add(report.device.name)
            if len(started) == 2:
                running.set()

        async with trio.open_nursery() as nursery:
            host = DriverHost(bridge, report=note)
            nursery.start_soon(host.run)
            with trio.fail_after(60):
                await running.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def one_life(socket: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            trio.run(use, socket)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@isolated
def test_two_hundred_killed_guests_leave_nothing(tmp_path: Path) -> None:
    """R50, R61: descriptors, tasks, mappings and TAPs are what they were."""
    with Served(tmp_path, CONFIG) as daemon:
        for _ in range(5):
            one_life(daemon.socket("g1"))
        before = settled(daemon), daemon.ask("stats", "daemon")["tasks"]
        taps = os.listdir("/sys/class/net")
        for _ in range(ROUNDS):
            one_life(daemon.socket("g1"))
        assert (settled(daemon), daemon.ask("stats", "daemon")["tasks"]) == before
        assert os.listdir("/sys/class/net") == taps
