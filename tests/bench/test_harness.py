"""Rounds, ratios and targets, without measuring anything."""

import json

from bench.harness import Metric, Results, Round, Spread, Suite, Target
from bench.table import as_json

AT_LEAST = Target("ours / peer", "ours", 0.5, "peer")
AT_MOST = Target("ours, absolute", "ours", 10, at_most=True)


def suite(*rounds: Round) -> Results:
    metrics = {name: Metric(name, "msgs") for name in ("ours", "peer", "c")}
    return Results(
        Suite("name", metrics, (AT_LEAST, AT_MOST), Round, {"c": lambda: 1.0}),
        list(rounds),
    )


def test_ratios_are_taken_inside_a_round() -> None:
    """The machine was ten times slower in one round: the ratios do not show it."""
    results = suite(
        {"ours": 1, "peer": 2}, {"ours": 10, "peer": 20}, {"ours": 60, "peer": 100}
    )
    assert results.against_target(AT_LEAST) == Spread(0.5, 0.5, 0.6)


def test_target_is_met_at_its_bound() -> None:
    """Reached means reached, in either direction."""
    assert AT_LEAST.meets(0.5)
    assert not AT_LEAST.meets(0.49)
    assert AT_MOST.meets(10)
    assert not AT_MOST.meets(10.1)


def test_missing_peer_leaves_its_targets_open() -> None:
    """No ratio is made up for a peer that is not installed."""
    results = suite({"ours": 1}, {"ours": 3})
    assert results.against_target(AT_LEAST) is None
    assert results.against_target(AT_MOST) == Spread(2, 1, 3)


def test_probe_runs_before_and_after_each_round() -> None:
    """What counts of the probe is the mean of both."""
    readings = iter([100.0, 300.0])
    measured = Suite(
        "name", {}, (), lambda: {"ours": 1.0}, {"c": lambda: next(readings)}
    )
    assert measured.run_round() == {"ours": 1.0, "c": 200.0}


def test_json_says_what_was_met_and_what_is_unknown() -> None:
    """The object for machines has the same verdicts as the table."""
    said = json.loads(json.dumps(as_json([suite({"ours": 20, "c": 40})])))["name"]
    assert said["metrics"]["ours"]["median"] == 20
    assert said["metrics"]["ours"]["probe_ratio"] == 0.5
    assert "peer" not in said["metrics"]
    assert [target["met"] for target in said["targets"]] == [None, False]
