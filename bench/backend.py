"""Backends: the same switch and venets in the daemon, and in a process of their own.

A switch in the daemon shares one thread with everything else there. In a process of
its own it has another core, if one is free, and pays with a bell through the daemon for
each signal to a guest. So there are loads of three kinds: TCP through the kernels of
guests, which take most of the cores themselves; frames that no kernel sees, so that the
host is what limits; and both while another guest calls the daemon without a pause.
"""

import json
import subprocess

from bench.daemon import Daemon
from bench.harness import Metric, Round, Suite, Target
from bench.lab import enter
from bench.messages import probe_trip
from bench.processes import FAR, Worker

_TIMEOUT_S = 120
_MS = 500
_KINDS = {"vbus": "in the daemon", "backend": "own process"}
_FIGURES = {
    "raw": Metric("frames of 1514 B, no kernel", "kpps"),
    "raw_busy": Metric("the same, daemon busy with calls", "kpps"),
    "raw_busy_call": Metric("those calls beside the frames, p50", "us"),
    "tcp_host": Metric("TCP guest to host", "Gbit/s"),
    "tcp_guest": Metric("TCP guest to guest", "Gbit/s"),
    "tcp_cpu": Metric("CPU of the host's side for 1 GB of it", "ms"),
    "tcp_busy": Metric("TCP guest to guest, daemon busy with calls", "Gbit/s"),
    "tcp_busy_call": Metric("those calls beside TCP, p50", "us"),
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
    done = subprocess.run(
        enter("backend_worker"),
        check=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
    )
    result: Round = json.loads(done.stdout)
    result["vbus_call"] = _call_us(_CALLS)
    result["backend_call"] = _call_us(_CALLS + _FAR_ECHO)
    return result


def _metrics() -> dict[str, Metric]:
    figures = {**_FIGURES, "call": Metric("DEVCALL, p50", "us")}
    metrics = {
        f"{kind}_{figure}": Metric(f"{metric.label}: {label}", metric.unit)
        for figure, metric in figures.items()
        for kind, label in _KINDS.items()
    }
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
            _target("raw", 1),
            _target("raw_busy", 1),
            _target("raw_busy_call", 1, at_most=True),
            _target("tcp_host", 1),
            _target("tcp_guest", 1),
            _target("tcp_busy", 1),
            _target("tcp_busy_call", 1, at_most=True),
            _target("udp", 1),
            _target("ping", 1.5, at_most=True),
        ),
        _measure,
        {"c": probe_trip},
    ),
)
