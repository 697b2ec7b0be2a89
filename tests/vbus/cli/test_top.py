"""`vbus top`: rates from counters, on a terminal, on a pipe and as JSON lines."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from proxy.guest import attach
from tests.system.served import WITHIN_S, Served
from vbus.cli.top import percentile, rates

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
COMMAND = [sys.executable, "-m", "vbus", "top", "--interval", "0.2"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def counters(times: int) -> dict[str, Any]:
    """Counters of a device and a guest that were at work so often."""
    buckets = [0] * 24
    buckets[4] = 98 * times
    buckets[9] = 2 * times
    bus = {
        "connections": 1,
        "signals": 400 * times,
        "coalesced": 100 * times,
        "calls": 100 * times,
        "latency": {"buckets": buckets},
    }
    events = {"posted": 30 * times, "coalesced": 10 * times, "delivered": 30 * times}
    own = {"tx_frames": 50 * times, "tx_bytes": 1000 * times}
    return {
        "daemon": {"cpu_s": times, "resident_kib": 9, "tasks": 1, "descriptors": 2},
        "device": {"d": {**own, "bus": bus}},
        "guest": {
            "g": {
                "bridge": {
                    "connections": 1,
                    "bridge_calls": 4 * times,
                    "fast_calls": 100 * times,
                    "doorbells": 6 * times,
                    "events": events,
                },
                "server": {"peer": [1, 2, 3], "messages": 8, "interrupts": 20 * times},
            }
        },
    }


def test_rates_are_what_happened_a_second() -> None:
    seen = rates(counters(1), counters(2), 2.0)
    device = seen["devices"]["d"]
    assert device["from_per_s"] == 25
    assert device["from_bits_per_s"] == 4000
    assert device["to_per_s"] == 0
    assert device["signals_per_s"] == 200
    assert device["coalesced_percent"] == 25
    assert device["calls_per_s"] == 50
    assert (device["p50_us"], device["p99_us"]) == (16, 512)
    guest = seen["guests"]["g"]
    assert guest["interrupts_per_s"] == 10
    assert guest["coalesced_percent"] == 25
    assert guest["attached"] is True
    assert seen["daemon"]["cpu_percent"] == 50


def test_what_came_or_was_made_anew_has_no_negative_rates() -> None:
    before, after = counters(3), counters(1)
    assert rates(before, after, 1.0)["devices"]["d"]["calls_per_s"] == 0
    del before["device"]["d"]
    assert rates(before, after, 1.0)["devices"] == {}
    idle = rates(after, after, 1.0)["devices"]["d"]
    assert (idle["p50_us"], idle["coalesced_percent"]) == (None, None)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=24), st.integers(1, 100))
def test_a_percentile_is_the_limit_of_a_bucket_that_reaches_it(
    buckets: list[int], percent: int
) -> None:
    limit = percentile(buckets, percent)
    if limit is None:
        assert sum(buckets) == 0
        return
    index = int(limit).bit_length() - 1
    assert sum(buckets[: index + 1]) >= sum(buckets) * percent / 100
    assert sum(buckets[:index]) < sum(buckets) * percent / 100


@contextmanager
def calling(daemon: Served) -> Iterator[None]:
    """A guest that calls echo0 all the time."""
    stop = threading.Event()

    async def call() -> None:
        async with attach(daemon.socket("g1")) as bridge:
            device = await bridge.open("echo0")
            while not stop.is_set():
                await device.call(0, b"x")

    thread = threading.Thread(target=trio.run, args=(call,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_json_shows_calls_as_they_are_made(daemon: Served) -> None:
    """One object a line, with devices, guests and latency."""
    with (
        calling(daemon),
        subprocess.Popen(
            [*COMMAND, "--json"], env=daemon.environment, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            seen = json.loads(line)
            if seen["devices"]["echo0"]["calls_per_s"]:
                break
        process.kill()
    device = seen["devices"]["echo0"]
    assert device["connections"] == 1
    assert device["p50_us"] >= 1
    assert seen["guests"]["g1"]["attached"] is True
    assert seen["guests"]["g1"]["fast_calls_per_s"] > 0


def test_once_on_a_pipe_is_one_plain_table(daemon: Served) -> None:
    shown = daemon.vbus("top", "--once", "--interval", "0.1")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert shown.stdout.count("\n echo0") + shown.stdout.count("\necho0") == 1
    assert "coalesced %" in shown.stdout


def test_a_pipe_that_closes_ends_it_without_a_word(daemon: Served) -> None:
    with subprocess.Popen(
        COMMAND,
        env=daemon.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WITHIN_S) == 1
        assert process.stderr.read() == ""


def test_on_a_terminal_it_gives_the_screen_back_when_interrupted(
    daemon: Served,
) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        COMMAND,
        env={**daemon.environment, "TERM": "xterm", "COLUMNS": "150", "LINES": "30"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        while b"echo0" not in shown:
            shown += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(leader, 65536)
            except OSError:
                break  # the terminal's other side is closed
            if not more:
                break
            shown += more
        assert process.wait(WITHIN_S) == 130
    os.close(leader)
    assert shown.index(b"\x1b[?1049h") < shown.index(b"\x1b[?1049l")
    assert b"Traceback" not in shown
