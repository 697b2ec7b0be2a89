"""Reports: the published schema, tables and CSV, interruption, cost models."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from vbus.compare import run, table, words
from vbus.compare.costs import PUBLISHED, TITLES, check
from vbus.compare.platforms import BARE
from vbus.compare.result import (
    SCHEMA_FILE,
    Costs,
    Measured,
    MeasuredLoad,
    MeasuredPoint,
    Quantity,
    Report,
    Sample,
    encode,
    load,
    missing,
    modelled,
    schema_text,
)
from vbus.errors import InvalidError


def measured(value: float, unit: str = "us") -> Quantity:
    return Quantity(unit, measured=Sample(value, value / 2, value * 2, 5))


def with_measurements(report: Report) -> Report:
    found = {
        "attach": measured(1250),
        "round_trip": measured(12.5),
        "hot_remove": missing("us", "no slot"),
        "interrupts_per_1000": measured(30, "interrupts"),
    }
    in_machine = {"bring_up": measured(9e6), "tcp_out": measured(3e8, "bit/s")}
    return msgspec.structs.replace(
        report,
        measured=Measured(
            machine="a machine",
            points=[
                MeasuredPoint("vbus-bridge", "process", 8, None, found),
                MeasuredPoint("function-each", "process", 8, "too many files", {}),
                MeasuredPoint("function-each", "machine", 8, None, in_machine),
            ],
            loads=[MeasuredLoad("vbus-bridge", "process", 8, 4, found)],
            not_measured={"boot": "no machine"},
        ),
    )


def validate(text: str) -> Any:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    value = json.loads(text)
    jsonschema.validate(value, schema)
    return value


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA_FILE.read_text() == schema_text()


def test_a_report_validates(report: Report) -> None:
    """R62: what other programs read has a published form."""
    value = validate(encode(report))
    assert [one["name"] for one in value["layouts"]] == list(run.LAYOUTS)


def test_a_report_with_measurements_validates_and_can_be_read(
    report: Report, tmp_path: Path
) -> None:
    whole = with_measurements(report)
    validate(encode(whole))
    path = tmp_path / "report.json"
    path.write_text(encode(whole))
    assert load(path, Report) == whole


@pytest.mark.parametrize(
    "change", [{"layouts": 3}, {"version": "1"}, {"surprise": 1}, {"costs": {}}]
)
def test_the_schema_refuses_what_is_no_report(
    report: Report, change: dict[str, Any]
) -> None:
    """A schema that takes everything would be no schema."""
    value = json.loads(encode(report)) | change
    with pytest.raises(jsonschema.ValidationError):
        validate(json.dumps(value))


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"name": 1}')
    with pytest.raises(InvalidError, match=r"bad\.json"):
        load(path, Costs)


def test_every_quantity_says_where_it_comes_from(report: Report) -> None:
    """Modelled, measured, or why there is none: never just a number."""
    every = [
        q
        for layout in report.layouts
        for p in layout.points
        for q in p.quantities.values()
    ]
    every += report.costs.entries.values()
    assert every
    for one in every:
        assert (one.value is None) == (one.missing is not None)


def test_where_a_layout_stops_it_says_why(report: Report) -> None:
    """R31: 40 transitional devices behind ports."""
    [ports] = [r for r in report.layouts if r.name == "virtio-transitional-ports"]
    assert ports.points[0].stopped is None
    assert ports.points[1].stopped == "I/O ports after 14 devices"
    assert ports.points[1].quantities == {}


def test_enumeration_under_all_three_answers(report: Report) -> None:
    """R40: "The comparison states enumeration cost for N functions under all three"."""
    for layout in report.layouts:
        got = layout.points[0].quantities
        user, kernel, mapped = (
            got[f"enumeration_hole_{who}"].value or 0
            for who in ("user", "kernel", "mapped")
        )
        assert user > kernel > mapped > 0


def test_memory_contexts_are_compared(report: Report) -> None:
    """R50: all memory for each group up front, or rings when they are asked for."""
    by_name = {one.name: one.points[1].quantities for one in report.layouts}
    bridge, ports = by_name["vbus-bridge"], by_name["virtio-modern-ports"]
    assert (ports["pages_up_front"].value or 0) == 40 * (
        bridge["pages_up_front"].value or 0
    )
    for found in (ports, bridge):
        assert found["pages_on_request"].value == 40 * 2 * 3


def test_the_map_is_of_an_allocation(report: Report) -> None:
    for layout in report.layouts:
        for space in layout.map.spaces:
            ends = [(one.start, one.start + one.size) for one in space.ranges]
            assert ends == sorted(ends)
            assert all(space.start <= a < b <= space.end for a, b in ends)
            assert all(0 <= one.used <= one.size for one in space.ranges)


def test_csv_has_every_number(report: Report) -> None:
    whole = with_measurements(report)
    rows = list(csv.DictReader(io.StringIO(table.to_csv(whole))))
    assert {row["origin"] for row in rows} == {"modelled", "measured", "none"}
    numbers = sum(len(p.quantities) for r in report.layouts for p in r.points)
    assert (
        sum(r["section"] == "layout" and r["quantity"] != "" for r in rows) == numbers
    )
    [trip] = [
        r for r in rows if r["section"] == "measured" and r["quantity"] == "round_trip"
    ]
    assert (trip["value"], trip["low"], trip["high"], trip["rounds"]) == (
        "12.5", "6.25", "25.0", "5",
    )  # fmt: skip


def test_tables_have_a_row_for_each_layout_and_every_stop(report: Report) -> None:
    shown = list(table.tables(with_measurements(report)))
    for one in shown:
        assert one.rows, one.title
        assert all(len(row) == len(one.headings) for row in one.rows), one.title
    text = "\n".join(cell for one in shown for row in one.rows for cell in row)
    assert "I/O ports" in text
    assert "too many files" in text
    assert "=12.5 us (6.25 us to 25 us, 5)" in text


def test_interrupted_leaves_out_what_was_not_done() -> None:
    done = []

    def step(what: str) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(what)

    report = run.model(BARE, PUBLISHED, (1,), step)
    assert report.interrupted
    assert len(report.layouts) == 3
    validate(encode(report))


def test_a_cost_model_has_every_entry() -> None:
    """R30."""
    lacking = dict(PUBLISHED.entries)
    del lacking["hypercall"]
    with pytest.raises(InvalidError, match="hypercall"):
        check(Costs("mine", "me", lacking))
    cycles = {**PUBLISHED.entries, "hole_user": modelled(1, "cycles")}
    with pytest.raises(InvalidError, match="cycles, not us"):
        check(Costs("mine", "me", cycles))
    assert set(PUBLISHED.entries) == set(TITLES)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.008193, "s", "0.0082"),
        (49158, "us", "49.2 ms"),
        (1.68e6, "us", "1.68 s"),
        (4096, "bytes", "4 KiB"),
        (32, "bytes", "32 B"),
        (1737, "cycles", "1,737"),
        (0, "us", "0 us"),
        (0.5, "us", "0.50 us"),
        (2.5e9, "bit/s", "2.50 Gbit/s"),
        (77e6, "bit/s", "77 Mbit/s"),
    ],
)
def test_numbers_for_people(value: float, unit: str, text: str) -> None:
    assert words.amount(value, unit) == text


def test_marks_tell_models_from_measurements() -> None:
    assert words.quantity(modelled(3, "vectors")) == "~3"
    assert words.quantity(measured(2, "vectors")) == "=2 (1 to 4, 5)"
    assert words.quantity(missing("us", "why")) == "-"
    assert words.cost(missing("us", "why")) == "- why"
