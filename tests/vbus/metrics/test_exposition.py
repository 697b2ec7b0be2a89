"""Any statistics become metrics that the format's own parser takes."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from shm import Gauge
from vbus.meter import Meter
from vbus.metrics.exposition import render
from vbus.metrics.sample import Sample


@dataclass(frozen=True)
class Part:
    rings: Gauge


@dataclass(frozen=True)
class Counted:
    frames: int
    ports: Gauge
    up: bool
    mac: str
    by_region: tuple[int, ...]
    part: Part


def values(samples: list[Sample]) -> dict[str, tuple[str, float]]:
    """Metrics by name with labels: type and value."""
    return {
        f"{sample.name}{sample.labels or ''}": (family.type, sample.value)
        for family in text_string_to_metric_families(render(samples).decode())
        for sample in family.samples
    }


def test_a_number_is_a_counter_unless_it_may_fall() -> None:
    counted = Counted(7, 3, True, "02::", (5, 6), Part(9))
    assert values([Sample("device", {}, counted)]) == {
        "vbus_device_frames_total": ("counter", 7),
        "vbus_device_ports": ("gauge", 3),
        "vbus_device_up": ("gauge", 1),
        "vbus_device_by_region_total{'index': '0'}": ("counter", 5),
        "vbus_device_by_region_total{'index': '1'}": ("counter", 6),
        "vbus_device_part_rings": ("gauge", 9),
    }


def test_latencies_are_a_histogram_in_seconds() -> None:
    """Once there are any: thousands of devices nobody calls cost no page of zeros."""
    meter = Meter()
    before = values([Sample("device", {}, meter.statistics(1))])
    assert before["vbus_device_calls_total"][1] == 0
    assert not any("latency" in name for name in before)
    for microseconds in (0.5, 1, 3, 3.9, 10_000_000):
        meter.called(int(microseconds * 1000), refused=False)
    found = values([Sample("device", {}, meter.statistics(1))])
    name = "vbus_device_latency_seconds"
    assert found[f"{name}_count"][1] == 5
    assert found[f"{name}_sum"][1] == 10.0000084
    below = {
        name.partition("'le': '")[2][:-2]: value
        for name, (_, value) in found.items()
        if "_bucket" in name
    }
    assert below["1e-06"] == 1
    assert below["2e-06"] == 2
    assert below["4e-06"] == 4
    assert below["4.194304"] == 4
    assert below["+Inf"] == 5


names = st.text(max_size=8)
numbers = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | names
trees = st.recursive(
    numbers, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@given(st.lists(st.tuples(names, trees), max_size=4), names)
def test_whatever_a_device_counts_the_text_is_well_formed(
    devices: list[tuple[str, object]], label: str
) -> None:
    """Two of a name, other alphabets, line ends in a label: no series comes twice."""
    samples = [Sample("device", {"device": name + label}, at) for name, at in devices]
    text = render(samples).decode()
    seen = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.items()))
            assert key not in seen
            seen.add(key)
