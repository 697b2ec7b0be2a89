"""`vbus compare` as a user runs it."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vbus.compare.result import SCHEMA_FILE

WITHIN_S = 120
PROCESSES = ("--measure", "--guests", "process")


def vbus(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vbus", "compare", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def report() -> Any:
    """What `--json` prints, of models alone."""
    done = vbus("--devices", "1,40", "--platform", "bare", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tables_for_people_and_the_page_beside_them(tmp_path: Path) -> None:
    """R62: by model, and the sentences of the threads with their numbers."""
    path = tmp_path / "page.html"
    done = vbus("--devices", "1,8", "--html", path)
    assert done.returncode == 0, done.stderr
    assert "vbus bridge" in done.stdout
    assert "~ modelled   = measured" in done.stdout
    assert "over 500" in done.stdout
    assert "kvm list, February to April 2013" in done.stdout
    assert done.stderr == ""
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") >= 8


def test_json_keeps_to_the_schema(report: Any) -> None:
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    assert report["platform"]["name"] == "bare"
    [ports] = [r for r in report["layouts"] if r["name"] == "virtio-transitional-ports"]
    assert ports["limit"]["devices"] == 15
    assert ports["limit"]["resource"] == "I/O ports"


@pytest.mark.parametrize(
    "words",
    [
        ("--devices", "0"),
        ("--devices", "9000"),
        ("--devices", "x"),
        ("--json", "--csv"),
        ("--platform", "vax"),
        ("--rounds", "0"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(words: tuple[str, ...]) -> None:
    assert vbus(*words).returncode == 2


def test_csv_has_a_number_a_line_by_the_costs_of_a_file(
    report: Any, tmp_path: Path
) -> None:
    """R30: the costs are those that calibrate writes into such a file."""
    costs = report["costs"] | {"name": "mine", "source": "my machine"}
    entry = costs["entries"]["hole_user"]
    costs["entries"] = costs["entries"] | {"hole_user": entry | {"modelled": 12.0}}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs))
    done = vbus("--devices", "1", "--platform", "bare", "--costs", path, "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {row["section"] for row in rows} == {
        "costs", "layout", "doorbell", "load", "claim",
    }  # fmt: skip
    first = report["layouts"][0]
    name = "enumeration_hole_user"
    [after] = [
        float(row["value"])
        for row in rows
        if (row["name"], row["quantity"]) == (first["name"], name)
    ]
    assert after == 2 * first["points"][0]["quantities"][name]["modelled"]


def test_a_bad_cost_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{}")
    done = vbus("--costs", path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "costs.json" in done.stderr


def test_machines_that_are_not_to_be_had_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asks for them does not get processes instead."""
    monkeypatch.setenv("VBUS_QEMU", "/bin/true")
    done = vbus("--devices", "1", "--measure", "--guests", "vm")
    assert done.returncode == 1
    assert "/bin/true" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_without_machines_it_measures_processes_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R62: everything but a boot is measured without a QEMU, and how often is said."""
    monkeypatch.setenv("VBUS_QEMU", "/bin/true")
    done = vbus("--devices", "2", "--measure", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "processes only, no virtual machine" in done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text()))
    found = value["measured"]
    assert {at["guest"] for at in found["points"]} == {"process"}
    assert "/bin/true" in found["not_measured"]["virtual machines"]
    points = {at["layout"]: at["quantities"] for at in found["points"]}
    assert points["vbus-bridge"]["call"]["measured"]["count"] == 1
    assert points["function-each"]["functions"]["measured"]["median"] == 2


@pytest.mark.slow
def test_ctrl_c_prints_what_was_measured() -> None:
    """Exit status 130, and a whole report of the rounds that were done."""
    words = ["--devices", "1,2", *PROCESSES, "--rounds", "40", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vbus", "compare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    tasks = Path(f"/proc/{process.pid}/task")
    seen: set[str] = set()
    end = time.monotonic() + WITHIN_S
    while len(seen) < 6:  # a daemon and a guest each round: two rounds are whole
        assert time.monotonic() < end
        assert process.poll() is None
        for path in tasks.glob("*/children"):
            with suppress(OSError):  # the thread may have ended
                seen.update(path.read_text().split())
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 130, err
    value = json.loads(out)
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text()))
    assert value["interrupted"]
    assert value["measured"]["points"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen)
