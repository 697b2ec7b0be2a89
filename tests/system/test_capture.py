"""`vbus capture` at a daemon with traffic: read by ourselves, and by tshark."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests import pcapng
from tests.system.served import WITHIN_S, Served
from tests.system.test_plug import Lines, running

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "p1"
class = "venet"
bus = "bus0"
switch = "lan0"
[[device]]
name = "p2"
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
needs_tshark = pytest.mark.skipif(not shutil.which("tshark"), reason="no tshark here")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    """A daemon with a guest whose two ports exchange generated frames."""
    with Served(tmp_path, CONFIG) as served, talking(served):
        yield served


@contextmanager
def talking(daemon: Served) -> Iterator[Lines]:
    words = ("guest", "run", daemon.socket("g1"), "--frames")
    with running(daemon, *words) as lines:
        for _ in range(2):
            lines.until(type="virtual-ethernet", state="running")
        yield lines


@contextmanager
def capturing(
    daemon: Served, *words: str | Path, stdout: int | IO[bytes] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen(
        [sys.executable, "-m", "vbus", "capture", *words],
        env=daemon.environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def captured(daemon: Served, *words: str) -> pcapng.Capture:
    """A finished capture."""
    file = daemon.runtime / "capture.pcapng"
    done = daemon.vbus("capture", *words, "-w", str(file))
    assert done.returncode == 0, done.stderr
    assert "frames captured" in done.stderr
    return pcapng.read(file.read_bytes())


def frames_sent(daemon: Served) -> int:
    count: int = daemon.ask("stats", "device/lan0")["forwarded"]
    return count


def test_a_switch_shows_its_ports_as_interfaces(daemon: Served) -> None:
    found = captured(daemon, "lan0", "-c", "300")
    names = [interface.name for interface in found.interfaces]
    assert names[0] == "lan0"
    assert sorted(names[1:]) == ["p1", "p2"]
    assert found.interfaces[1].description.endswith("of switch lan0")
    assert len(found.packets) == 300
    macs = {
        one["name"]: one["attributes"]["client_mac"]
        for one in daemon.ask("device", "show")
        if one["class"] == "venet"
    }
    for packet in found.packets:
        assert packet.data[6:12].hex(":") == macs[packet.interface]
        assert packet.length == len(packet.data)
        assert packet.direction == 1
    assert {packet.length for packet in found.packets} >= {1514}
    times = [packet.time_ns for packet in found.packets]
    assert times == sorted(times)
    assert abs(times[-1] - time.time_ns()) < 60e9


def test_a_port_shows_both_directions_and_no_more_than_is_wanted(
    daemon: Served,
) -> None:
    found = captured(daemon, "p1", "-c", "200", "-s", "60")
    assert {packet.direction for packet in found.packets} == {1, 2}
    assert {packet.interface for packet in found.packets} == {"p1"}
    assert max(len(packet.data) for packet in found.packets) == 60
    assert max(packet.length for packet in found.packets) == 1514


def test_an_interrupt_ends_the_file_with_what_was_counted(daemon: Served) -> None:
    file = daemon.runtime / "capture.pcapng"
    with capturing(daemon, "lan0", "-w", file) as process:
        while not file.exists() or file.stat().st_size < 100_000:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0
    found = pcapng.read(file.read_bytes())
    dropped = sum(packet.dropped for packet in found.packets)
    assert f"{len(found.packets)} frames captured" in said.decode()
    received = [interface.received for interface in found.interfaces]
    assert None not in received
    assert sum(filter(None, received)) >= len(found.packets) + dropped


def test_a_reader_that_does_not_read_slows_nobody_and_is_told_its_losses(
    daemon: Served,
) -> None:
    """The switch goes on; what did not fit is counted, where it is missing."""
    with capturing(daemon, "lan0", "-w", "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        head = process.stdout.read(64)
        start = frames_sent(daemon)
        while frames_sent(daemon) < start + 20_000:
            assert process.poll() is None
        resident = daemon.ask("stats", "daemon/resident_kib")
        # Now it reads: all that waited, and what came after the losses.
        data = head + process.stdout.read(12 << 20)
        process.send_signal(signal.SIGINT)
        data += process.stdout.read()
        assert process.stderr is not None
        said = process.stderr.read()
    packets = pcapng.read(data).packets
    dropped = sum(packet.dropped for packet in packets)
    assert dropped > 1000
    assert int(said.split()[-2]) >= dropped
    assert resident < 400_000


@needs_tshark
def test_tshark_reads_it_while_it_runs(daemon: Served) -> None:
    fields = ("frame.interface_name", "frame.len", "eth.src")
    with capturing(daemon, "lan0", "-w", "-", stdout=subprocess.PIPE) as process:
        done = subprocess.run(
            ["tshark", "-r", "-", "-c", "100", "-T", "fields"]
            + [word for name in fields for word in ("-e", name)],
            stdin=process.stdout,
            capture_output=True,
            text=True,
            timeout=WITHIN_S * 2,
            check=True,
        )
        assert process.poll() is None or process.returncode in (0, 1)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 100
    assert {line[0] for line in lines} == {"p1", "p2"}
    assert "1514" in {line[1] for line in lines}


@needs_tshark
def test_tshark_finds_nothing_wrong_with_a_whole_file(daemon: Served) -> None:
    captured(daemon, "lan0", "-c", "500")
    file = daemon.runtime / "capture.pcapng"
    done = subprocess.run(
        ["tshark", "-r", file, "-q", "-z", "io,stat,0"],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=True,
    )
    assert " 500 " in done.stdout
    info = shutil.which("capinfos")
    if info is not None:
        told = subprocess.run([info, file], capture_output=True, text=True, check=True)
        assert "Name = p1" in told.stdout


def test_it_ends_with_its_device(daemon: Served) -> None:
    file = daemon.runtime / "capture.pcapng"
    with capturing(daemon, "p1", "-w", file) as process:
        while not file.exists() or not file.stat().st_size:
            assert process.poll() is None
        assert daemon.vbus("device", "del", "p1").returncode == 0
        _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0
    assert "p1 was removed" in said.decode()
    pcapng.read(file.read_bytes())


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("echo0", "-w", "/dev/null"), 1, "echo0 has no frames"),
        (("nonesuch", "-w", "/dev/null"), 1, "no device 'nonesuch'"),
        (("lan0", "-w", "/nonesuch/file"), 1, "/nonesuch/file"),
        (("lan0",), 2, "--write"),
        (("lan0", "-w", "/dev/null", "-s", "3"), 2, "3"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    with Served(tmp_path, CONFIG) as daemon:
        done = daemon.vbus("capture", *words)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[0]
