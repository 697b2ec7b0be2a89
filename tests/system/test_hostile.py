"""A guest may write anything anywhere: only its own connection may suffer."""

import subprocess
import sys
from pathlib import Path

import trio

from proxy.guest import attach
from tests.system.served import Served

SECONDS = 12
CONFIG = """
[[bus]]
name = "bad"
[[bus]]
name = "good"
[[device]]
name = "echo-bad"
class = "echo"
bus = "bad"
[[device]]
name = "echo-good"
class = "echo"
bus = "good"
[[guest]]
name = "bad"
bus = "bad"
[[guest]]
name = "good"
bus = "good"
"""


def hammer(daemon: Served, seed: int, seconds: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.system.hammer",
            daemon.socket("bad"),
            str(seed),
            str(seconds),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


async def calls_while(daemon: Served, process: "subprocess.Popen[str]") -> int:
    """Call the good guest's device all the time; how often it answered."""
    answered = 0
    async with attach(daemon.socket("good")) as bridge:
        echo = await bridge.open("echo-good")
        while process.poll() is None:
            with trio.fail_after(60):
                _, answer = await echo.call(0, answered.to_bytes(8, "little"))
            assert answer == answered.to_bytes(8, "little")
            answered += 1
    return answered


def lives(process: "subprocess.Popen[str]") -> int:
    """How often the hammer attached; it must have ended by itself."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return int(out)


def settled(daemon: Served) -> tuple[int, int]:
    """Descriptors and mappings, once the last guest is gone for the daemon too.

    And once each backend that it starts has a successor.
    """
    while any(guest["attached"] for guest in daemon.ask("guest", "show")):
        pass
    while any(
        one["supervised"] and one["state"] == "up" and one["standby"] is None
        for one in daemon.ask("backend", "show")
    ):
        pass
    return daemon.fds, daemon.mappings


async def test_garbage_everywhere_hurts_nobody_else(tmp_path: Path) -> None:
    """R3, R50, R51: the others go on; nothing of the guest stays."""
    with Served(tmp_path, CONFIG) as daemon:
        warm_up = hammer(daemon, 1, 2)
        await calls_while(daemon, warm_up)
        lives(warm_up)
        before, memory = settled(daemon), daemon.private_kib
        process = hammer(daemon, 1000, SECONDS)
        answered = await calls_while(daemon, process)
        assert lives(process) > 5
        assert answered > 100
        assert settled(daemon) == before
        assert daemon.private_kib < memory + 8192
