"""The tools that measure do what they say; how fast is not asked here."""

import shutil
import subprocess
import threading

import pytest

from bench import messages
from bench.processes import Worker, c_tool, probe
from bench.rings import RingFiles

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

SHORT_MS = 20


@pytest.mark.parametrize("size", [64, 1500, 65536])
def test_probe_moves_messages(size: int) -> None:
    """The yardstick runs for each size it is used for."""
    [rate] = probe("ring", size, 32, 64, SHORT_MS)
    assert rate > 0


def test_probe_takes_the_time_of_round_trips() -> None:
    """The median is not above the 99th percentile."""
    p50, p99 = probe("eventfd", SHORT_MS)
    assert 0 < p50 <= p99


@pytest.mark.parametrize("mode", ["blocking", "trio"])
@pytest.mark.parametrize("size", [64, 65536])
def test_every_message_between_two_processes_arrives(mode: str, size: int) -> None:
    """R12: both ends of a ring on the host; what was sent is what was counted."""
    files = RingFiles.create(1, 64)
    words = (mode, *files.words(), size, SHORT_MS)
    south = Worker("ring_worker", "south", *words, fds=files.fds)
    north = Worker("ring_worker", "north", *words, fds=files.fds)
    files.close()
    try:
        sent, taken = north.result(), south.result()
    finally:
        north.stop()
        south.stop()
    assert sent["messages"] == taken["messages"] > 1


def test_peers_that_need_nothing_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """SEQPACKET and trio with msgpack run with what the project depends on."""
    monkeypatch.setattr(messages, "_MS", SHORT_MS)
    assert messages._seqpacket(64) > 0
    assert messages.trio_msgpack_trip() > 0


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_pusher_and_sink_agree(kind: str) -> None:
    """The traffic tool's two ends work over the loopback interface."""
    tool, port = c_tool("traffic.c"), "17007"
    command = [str(tool), f"{kind}-sink", port]
    extra = ["64"] if kind == "udp" else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout is not None
        watchdog = threading.Timer(20, sink.kill)
        watchdog.start()
        assert sink.stdout.readline() == "ready\n"
        subprocess.run(
            [tool, f"{kind}-source", "127.0.0.1", port, *extra, str(SHORT_MS)],
            check=True,
        )
        assert float(sink.stdout.readline()) > 0
        watchdog.cancel()
