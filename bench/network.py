"""Ethernet: a venet switch beside the kernel's bridge and VDE, by the same pusher.

Three places are connected each time: the hub, where the switch runs, and two guests in
namespaces of their own. MTU 1500, no pinning.
"""

import json
import subprocess

from bench.harness import Metric, Round, Suite, Target
from bench.lab import enter
from bench.messages import probe_ring, probe_trip

_TIMEOUT_S = 60

_KINDS = {
    "vbus": "venet",
    "veth": "veth + kernel bridge",
    "vde_switch": "vde_switch with TAPs",
    "vde_plug2tap": "vde_plug2tap",
}
_FIGURES = {
    "tcp_host": Metric("TCP guest to host", "Gbit/s"),
    "tcp_guest": Metric("TCP guest to guest", "Gbit/s"),
    "udp": Metric("UDP 64 B, received", "kpps"),
    "ping": Metric("ping guest to host, p50", "us"),
}


def _measure() -> Round:
    result: Round = {}
    for kind in _KINDS:
        done = subprocess.run(
            enter("switch_worker", kind),
            check=True,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )
        for figure, value in json.loads(done.stdout).items():
            result[f"{kind}_{figure}"] = value
    return result


def _metrics() -> dict[str, Metric]:
    metrics = {
        f"{kind}_{figure}": Metric(f"{metric.label}: {label}", metric.unit)
        for figure, metric in _FIGURES.items()
        for kind, label in _KINDS.items()
    }
    metrics["vbus_interrupts"] = Metric("venet: interrupts, bulk TCP", "/1000 frames")
    metrics["c_64k"] = Metric("C ring, busy, 64 KiB", "Gbit/s")
    metrics["c_64"] = Metric("C ring, busy, 64 B", "kpps")
    metrics["c"] = Metric("C eventfd round trip, p50", "us")
    return metrics


def _probe_gbit_s() -> float:
    return probe_ring(65536) * 65536 * 8 / 1e9


def _probe_kpps() -> float:
    return probe_ring(64) / 1e3


SUITES = (
    Suite(
        "ethernet",
        _metrics(),
        (
            Target(
                "venet TCP guest to host / veth",
                "vbus_tcp_host",
                0.4,
                "veth_tcp_host",
                later=".85",
            ),
            Target(
                "venet TCP guest to host / vde_switch",
                "vbus_tcp_host",
                4,
                "vde_switch_tcp_host",
            ),
            Target(
                "venet TCP guest to guest / veth",
                "vbus_tcp_guest",
                0.3,
                "veth_tcp_guest",
                later=".7",
            ),
            Target(
                "venet TCP guest to guest / vde_switch",
                "vbus_tcp_guest",
                3,
                "vde_switch_tcp_guest",
            ),
            Target(
                "venet UDP 64 B / vde_switch",
                "vbus_udp",
                0.7,
                "vde_switch_udp",
                later="1.5 x Open vSwitch in user space",
            ),
            Target(
                "venet ping p50 / vde_switch",
                "vbus_ping",
                2.5,
                "vde_switch_ping",
                at_most=True,
                later="1.2",
            ),
            Target(
                "interrupts per 1,000 frames, bulk TCP",
                "vbus_interrupts",
                50,
                at_most=True,
                later="10",
            ),
        ),
        _measure,
        {"c_64k": _probe_gbit_s, "c_64": _probe_kpps, "c": probe_trip},
    ),
)
