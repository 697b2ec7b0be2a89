"""Rounds, medians, ratios and targets. Knows nothing of what is measured.

A suite gives the metrics of one round by name. A target says what one metric must
reach: as a multiple of another of the same round (only ratios of one run count), or
absolutely.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

Round = dict[str, float]


@dataclass(frozen=True)
class Target:
    """What must hold: `metric` at least (or at most) `bound` times `against`."""

    row: str
    metric: str
    bound: float
    against: str | None = None
    at_most: bool = False
    later: str = ""
    """Where we are going, for the reader."""

    def meets(self, value: float) -> bool:
        """Whether this ratio (or value, if absolute) is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Metric:
    """What a number says, and its unit."""

    label: str
    unit: str


@dataclass(frozen=True)
class Suite:
    """What is measured together, because it is compared."""

    name: str
    metrics: dict[str, Metric]
    """In the order in which they are shown; the probes' too."""
    targets: tuple[Target, ...]
    measure: Callable[[], Round]
    """One round; a peer that is missing leaves its metrics out."""
    probes: dict[str, Callable[[], float]] = field(default_factory=dict)
    """Metrics of the C probe, taken before and after each round: the mean counts."""

    def run_round(self) -> Round:
        """Measure once, between probes."""
        before = {name: probe() for name, probe in self.probes.items()}
        result = self.measure()
        for name, probe in self.probes.items():
            result[name] = (before[name] + probe()) / 2
        return result

    def probe_of(self, name: str) -> str | None:
        """The probe of the same unit as a metric, if there is one."""
        unit = self.metrics[name].unit
        same = [probe for probe in self.probes if self.metrics[probe].unit == unit]
        return same[0] if same and name not in self.probes else None


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, and the lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Results:
    """All rounds of one suite."""

    suite: Suite
    rounds: list[Round] = field(default_factory=list)

    def metric(self, name: str) -> Spread | None:
        """None if no round could measure it."""
        values = [each[name] for each in self.rounds if name in each]
        return Spread.of(values) if values else None

    def against_target(self, target: Target) -> Spread | None:
        """The ratio (taken inside each round), or the value of an absolute target."""
        if target.against is None:
            return self.metric(target.metric)
        return self.ratio(target.metric, target.against)

    def ratio(self, name: str, against: str) -> Spread | None:
        """One metric over another, inside each round that has both."""
        ratios = [
            each[name] / each[against]
            for each in self.rounds
            if name in each and each.get(against)
        ]
        return Spread.of(ratios) if ratios else None
