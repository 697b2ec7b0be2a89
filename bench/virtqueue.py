"""Virtqueues from Python: what a device can take and give back, without its work."""

from bench.harness import Metric, Round, Suite
from bench.processes import Worker

BATCH = 32
SEGMENT = 4096
_MS = 300
_EVENT_IDX, _PACKED = 1 << 29, 1 << 34


def _rate(features: int, what: str) -> float:
    worker = Worker("virtqueue_worker", features, what, _MS)
    try:
        return float(worker.result()["rate"])
    finally:
        worker.stop()


def chains() -> Round:
    """One round, chains a second."""
    return {
        f"{name}-{what}": _rate(_EVENT_IDX | features, what)
        for name, features in (("split", 0), ("packed", _PACKED))
        for what in ("bare", "copy")
    }


_LABELS = {"bare": "taken and given back", "copy": "and copied to one buffer"}

SUITES = (
    Suite(
        "virtqueue",
        {
            f"{name}-{what}": Metric(f"{name} ring, 4 KiB chains, {label}", "chains/s")
            for name in ("split", "packed")
            for what, label in _LABELS.items()
        },
        (),
        chains,
    ),
)
