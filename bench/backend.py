"""Backends: the same switch and venets in the daemon, and in a process of their own."""

import json
import subprocess

from bench.daemon import Daemon
from bench.harness import Metric, Round, Suite, Target
from bench.lab import enter
from bench.messages import probe_ring, probe_trip
from bench.processes import FAR, Worker

_TIMEOUT_S = 60
_MS = 500
_KINDS = {"vbus": "in the daemon", "backend": "own process"}
_FIGURES = {
    "tcp_host": Metric("TCP guest to host", "Gbit/s"),
    "tcp_guest": Metric("TCP guest to guest", "Gbit/s"),
    "udp": Metric("UDP 64 B, received", "kpps"),
    "ping": Metric("ping guest to host, p50", "us"),
}
_CALLS = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
"""
_FAR_ECHO = """
[[backend]]
name = "far"
classes = ["echo"]
"""


def _call_us(config: str) -> float:
    with Daemon(config, core=FAR) as daemon:
        worker = Worker("call_worker", daemon.socket("g1"), "echo0", _MS)
        try:
            return float(worker.result()["p50_ns"]) / 1000
        finally:
            worker.stop()


def _measure() -> Round:
    result: Round = {
        "vbus_call": _call_us(_CALLS),
        "backend_call": _call_us(_CALLS + _FAR_ECHO),
    }
    for kind in _KINDS:
        done = subprocess.run(
            enter("switch_worker", kind),
            check=True,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )
        said = json.loads(done.stdout)
        for figure in _FIGURES:
            result[f"{kind}_{figure}"] = said[figure]
    return result


def _metrics() -> dict[str, Metric]:
    figures = {**_FIGURES, "call": Metric("DEVCALL, p50", "us")}
    metrics = {
        f"{kind}_{figure}": Metric(f"{metric.label}: {label}", metric.unit)
        for figure, metric in figures.items()
        for kind, label in _KINDS.items()
    }
    metrics["c_64k"] = Metric("C ring, busy, 64 KiB", "Gbit/s")
    metrics["c_64"] = Metric("C ring, busy, 64 B", "kpps")
    metrics["c"] = Metric("C eventfd round trip, p50", "us")
    return metrics


def _target(figure: str, bound: float, *, at_most: bool = False) -> Target:
    row = f"{_FIGURES[figure].label}: own process / in the daemon"
    return Target(row, f"backend_{figure}", bound, f"vbus_{figure}", at_most=at_most)


SUITES = (
    Suite(
        "backend",
        _metrics(),
        (
            _target("tcp_host", 1),
            _target("tcp_guest", 1),
            _target("udp", 1),
            _target("ping", 1.5, at_most=True),
        ),
        _measure,
        {
            "c_64k": lambda: probe_ring(65536) * 65536 * 8 / 1e9,
            "c_64": lambda: probe_ring(64) / 1e3,
            "c": probe_trip,
        },
    ),
)
