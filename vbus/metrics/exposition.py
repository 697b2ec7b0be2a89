"""Statistics as metrics: the same counters as `vbus stats`, in Prometheus' text format.

A frozen dataclass gives a metric for each of its numbers, named after kind and field:
vbus_device_tx_frames_total{device="lan0-g1",class="venet"}. An int is a counter, unless
it is annotated as a `Gauge`; what comes in a plain dict is of unknown type. Text is
left out. Nothing here is global: each rendering has a registry of its own.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import get_type_hints

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shm.statistics import GAUGE
from vbus.meter import LatencyStatistics
from vbus.metrics.sample import Labels, Sample

_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")
_US_PER_S = 1e6
_TOO_BIG = 1 << 256
"""No counter gets there, and a number must fit into a float."""
_UNKNOWN = "unknown"


def render(samples: Iterable[Sample]) -> bytes:
    """Make the text. For any thread: it only looks at what is given."""
    families = _Families()
    for sample in samples:
        families.add(_name("vbus", sample.kind), sample.labels, sample.statistics)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(families)
    return generate_latest(registry)


@cache
def _gauges(cls: type) -> frozenset[str]:
    """Name the fields of a dataclass that may fall."""
    hints = get_type_hints(cls, include_extras=True)
    return frozenset(
        name
        for name, hint in hints.items()
        if GAUGE in getattr(hint, "__metadata__", ())
    )


def _name(*parts: str) -> str:
    return _NOT_A_NAME.sub("_", "_".join(parts))


class _Families(Collector):
    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()

    def add(
        self, name: str, labels: Labels, value: object, kind: str = _UNKNOWN
    ) -> None:
        """Add what has numbers in it; `kind` is how to take a number."""
        if isinstance(value, LatencyStatistics):
            if value.count:  # most devices are never called; their zeros fill pages
                self._histogram(f"{name}_seconds", labels, value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            gauges = _gauges(type(value))
            for field in dataclasses.fields(value):
                kind = "gauge" if field.name in gauges else "counter"
                at = getattr(value, field.name)
                self.add(_name(name, field.name), labels, at, kind)
        elif isinstance(value, Mapping):
            for key, at in value.items():
                self.add(_name(name, str(key)), labels, at, _UNKNOWN)
        elif type(value) is tuple:
            for index, at in enumerate(value):
                self.add(name, {**labels, "index": str(index)}, at, kind)
        elif isinstance(value, bool):
            self._number(name, labels, value, "gauge")
        elif isinstance(value, int | float) and abs(value) < _TOO_BIG:
            self._number(name, labels, value, kind)

    def _family(
        self, sample: str, name: str, kind: str, labels: Labels
    ) -> Metric | None:
        """Give the family of a sample; None if the very same was there already."""
        key = (sample, tuple(sorted(labels.items())))
        if key in self._seen:
            return None
        self._seen.add(key)
        family = self._families.get(sample)
        if family is None:
            family = self._families[sample] = Metric(name, name.replace("_", " "), kind)
        return family

    def _number(self, name: str, labels: Labels, value: float, kind: str) -> None:
        sample = f"{name}_total" if kind == "counter" else name
        family = self._family(sample, name, kind, labels)
        if family is not None:
            family.add_sample(sample, labels, float(value))

    def _histogram(self, name: str, labels: Labels, value: LatencyStatistics) -> None:
        family = self._family(f"{name}_bucket", name, "histogram", labels)
        if family is None:
            return
        below = 0
        for index, count in enumerate(value.buckets[:-1]):
            below += count
            limit = {**labels, "le": repr(2**index / _US_PER_S)}
            family.add_sample(f"{name}_bucket", limit, below)
        family.add_sample(f"{name}_bucket", {**labels, "le": "+Inf"}, value.count)
        family.add_sample(f"{name}_sum", labels, value.total_us / _US_PER_S)
        family.add_sample(f"{name}_count", labels, value.count)
