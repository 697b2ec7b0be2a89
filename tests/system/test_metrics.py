"""The metrics of a daemon, as Prometheus and curl see them, and as an enemy does."""

import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from proxy.guest import attach
from tests.system.served import Served

CONFIG = """
[daemon]
metrics = "127.0.0.1:0"
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
GET = b"GET /metrics HTTP/1.1\r\nHost: vbus\r\n\r\n"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def tcp_port(daemon: Served) -> int:
    [line] = [one for one in daemon.log.read_text().splitlines() if "http://" in one]
    return int(line.partition("http://127.0.0.1:")[2].partition("/")[0])


def connect(daemon: Served) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.runtime / "metrics.sock"))
    sock.settimeout(10)
    return sock


def told(sock: socket.socket, data: bytes) -> tuple[int, str, str]:
    """Send a request: status, head and body of the answer, up to the hang-up."""
    sock.sendall(data)
    said = b""
    while more := sock.recv(65536):
        said += more
    head, _, body = said.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


def samples(text: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def scraped(daemon: Served) -> dict[str, list[Sample]]:
    with connect(daemon) as sock:
        status, head, body = told(sock, GET)
    assert status == 200
    assert "content-type: text/plain; version=0.0.4" in head
    return samples(body)


def test_counters_of_everything_are_there_with_names_as_labels(daemon: Served) -> None:
    """The same numbers as in `vbus stats`, of everything that has a name."""

    async def call() -> None:
        async with attach(daemon.socket("g1")) as bridge:
            await (await bridge.open("echo0")).call(0, b"x")

    trio.run(call)
    found = scraped(daemon)
    [calls] = found["vbus_device_bus_calls_total"][1:]
    assert calls.labels == {"device": "echo0", "class": "echo"}
    assert calls.value == 1
    [ids] = found["vbus_bus_ids_total"]
    assert (ids.labels, ids.value) == ({"bus": "bus0"}, 1)
    [macs] = found["vbus_device_macs"]
    assert macs.labels == {"device": "lan0", "class": "switch"}
    [attached] = found["vbus_guest_attached"]
    assert (attached.labels, attached.value) == ({"guest": "g1", "bus": "bus0"}, 0)
    reads = {
        one.labels["index"]: one.value
        for one in found["vbus_guest_server_region_reads_total"]
    }
    stats = daemon.ask("stats", "guest/g1/server/region_reads")
    assert [reads[str(index)] for index in range(len(stats))] == stats
    buckets = [
        one
        for one in found["vbus_device_bus_latency_seconds_bucket"]
        if one.labels["device"] == "echo0"
    ]
    assert buckets[-1].labels["le"] == "+Inf"
    values = [one.value for one in buckets]
    assert values == sorted(values)
    assert values[-1] == 1


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl_gets_them_over_both_sockets(daemon: Served) -> None:
    path = daemon.runtime / "metrics.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    common = ["curl", "--silent", "--show-error", "--fail", "--max-time", "10"]
    by_unix = [*common, "--unix-socket", str(path), "http://vbus/metrics"]
    by_tcp = [*common, f"http://127.0.0.1:{tcp_port(daemon)}/metrics"]
    for command in (by_unix, by_tcp):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "vbus_daemon_uptime_s_total" in samples(done.stdout)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", 405),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000, 431),
        (b"\x16\x03\x01" + b"\0" * 200 + b"\r\n\r\n", 400),
    ],
)
def test_every_other_request_is_answered_and_ended(
    daemon: Served, request_: bytes, status: int
) -> None:
    with connect(daemon) as sock:
        got, _, body = told(sock, request_)
    assert got == status
    assert bool(body) == (status != 200)
    assert scraped(daemon)


def test_a_slow_or_hostile_client_hurts_nobody(daemon: Served) -> None:
    """Silent ones, dripping ones, ones that never read: others are served at once."""
    fds = daemon.fds
    with ExitStack() as stack:
        for nth in range(100):
            sock = stack.enter_context(connect(daemon))
            if nth % 3 == 0:
                sock.sendall(b"GET /met")
            elif nth % 3 == 1:
                sock.sendall(GET)
        assert scraped(daemon)
        assert daemon.ask("tree")["buses"]
        assert daemon.fds <= fds + 16
    end = time.monotonic() + 10
    while daemon.fds > fds:
        assert time.monotonic() < end
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("value", ["9469", "127.0.0.1:", "127.0.0.1:99999", ":1"])
def test_a_wrong_address_is_a_wrong_configuration(tmp_path: Path, value: str) -> None:
    daemon = Served(tmp_path, f"[daemon]\nmetrics = '{value}'\n")
    assert daemon.process.wait(20) == 78
    assert "is not HOST:PORT" in daemon.log.read_text()


def test_a_taken_address_ends_the_daemon_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = Served(tmp_path, f"[daemon]\nmetrics = '127.0.0.1:{port}'\n")
        assert daemon.process.wait(20) == 1
    text = daemon.log.read_text()
    assert f"vbus: no metrics on 127.0.0.1 port {port}: Address already in use" in text
    assert "Traceback" not in text
