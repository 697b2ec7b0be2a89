"""The bus itself: calls, devices by the thousand, hot plug."""

from bench.daemon import Daemon
from bench.harness import Metric, Round, Suite, Target
from bench.messages import probe_trip, trio_msgpack_trip
from bench.processes import FAR, Worker

_MS = 500
_DEVICES = 1000

_CONFIG = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


def _echoes(count: int) -> str:
    return _CONFIG + "".join(
        f'[[device]]\nname = "echo{nth}"\nclass = "echo"\nbus = "bus0"\n'
        for nth in range(count)
    )


def _call_us() -> float:
    with Daemon(_echoes(1), core=FAR) as daemon:
        worker = Worker("call_worker", daemon.socket("g1"), "echo0", _MS)
        try:
            return float(worker.result()["p50_ns"]) / 1000
        finally:
            worker.stop()


def calls() -> Round:
    """DEVCALL beside a small call protocol over a stream, microseconds."""
    inside = Worker("plain_worker").result()
    return {"devcall": _call_us(), "msgpack": trio_msgpack_trip(), **inside}


def _memory(devices: int) -> int:
    with Daemon(_echoes(devices)) as daemon:
        daemon.socket("g1")
        listed = daemon.ask("device", "show")
        if len(listed) != devices:
            raise RuntimeError(f"{len(listed)} devices of {devices}")
        return daemon.private_bytes()


def _hot_add_us() -> float:
    with Daemon(_CONFIG) as daemon:
        worker = Worker(
            "hotplug_worker",
            daemon.socket("g1"),
            daemon.runtime / "control.sock",
            _DEVICES,
        )
        try:
            return float(worker.result()["us_per_device"])
        finally:
            worker.stop()


def devices() -> Round:
    """Memory per idle device, and hot plug to "its driver opened it"."""
    more = _memory(_DEVICES) - _memory(0)
    return {"memory": more / _DEVICES / 1024, "hot_add": _hot_add_us()}


SUITES = (
    Suite(
        "call",
        {
            "devcall": Metric("DEVCALL 64 B, host-process guest, p50", "us"),
            "msgpack": Metric("trio stream + msgpack call, p50", "us"),
            "plain": Metric("the bus's part of a DEVCALL, CPU, no trace", "us CPU"),
            "traced": Metric("the same with a trace", "us CPU"),
            "c": Metric("C eventfd round trip, p50", "us"),
        },
        (
            Target(
                "DEVCALL / trio + msgpack call",
                "devcall",
                1.0,
                "msgpack",
                at_most=True,
                later=".3 while the daemon is awake",
            ),
        ),
        calls,
        {"c": probe_trip},
    ),
    Suite(
        "devices",
        {
            "memory": Metric("daemon's memory per idle device, of 1,000", "KiB"),
            "hot_add": Metric("hot add to opened, per device in bulk", "us"),
            "c": Metric("C eventfd round trip, p50", "us"),
        },
        (
            Target(
                "memory per idle device [KiB]", "memory", 30, at_most=True, later="8"
            ),
            Target(
                "hot add to opened [us]", "hot_add", 1000, at_most=True, later="100"
            ),
        ),
        devices,
        {"c": probe_trip},
    ),
)
