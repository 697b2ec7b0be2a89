"""Backends in processes of their own, under the daemon as a process."""

import os
import signal
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from tests.system.served import Served

CONFIG = """
[[bus]]
name = "bus0"
[[backend]]
name = "far"
classes = ["echo"]
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


async def call(daemon: Served, data: bytes) -> bytes:
    async with attach(daemon.socket("g1")) as bridge:
        _, answer = await (await bridge.open("echo0")).call(0, data)
    return answer


def test_a_device_in_a_process_of_its_own_answers_a_guest(tmp_path: Path) -> None:
    """R60: the class is the same, the process is not the daemon's."""
    with Served(tmp_path, CONFIG) as daemon:
        (shown,) = daemon.ask("backend", "show")
        assert shown["state"] == "up"
        assert shown["pid"] != daemon.process.pid
        assert trio.run(call, daemon, b"far away") == b"far away"
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()
