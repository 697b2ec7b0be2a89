"""What a comparison is made of: the structures that every report and JSON come from.

A `Quantity` is one number with its unit. It may be modelled, measured or both; what
could be neither says why. `schema()` is the JSON schema of a whole `Report`.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vbus.errors import InvalidError

VERSION = 1


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured value: the median of `count` rounds, the lowest, the highest."""

    median: float
    low: float
    high: float
    count: int


class Quantity(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One number: by model, by measurement, or `missing` and why."""

    unit: str
    modelled: float | None = None
    measured: Sample | None = None
    missing: str | None = None

    @property
    def value(self) -> float | None:
        """What was measured, else what was modelled, else None."""
        return self.measured.median if self.measured else self.modelled


Quantities = dict[str, Quantity]


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cost model: what an access costs; `source` says whose numbers these are."""

    name: str
    source: str
    entries: Quantities


class Stop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many devices fit, and which resource ran out ("" if none did)."""

    devices: int
    resource: str
    detail: str


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layout with so many devices; nothing is known of it where it stopped."""

    devices: int
    stopped: str | None
    quantities: Quantities


class MapRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses that something takes. `used` is what BARs fill of it."""

    start: int
    size: int
    used: int
    owner: str


class MapSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An address space of the root bus and everything in it, in order."""

    name: str
    start: int
    end: int
    ranges: list[MapRange]


class AddressMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where so many devices lie."""

    devices: int
    spaces: list[MapSpace]


class LayoutResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layout: what it takes as devices multiply, and where it stops."""

    name: str
    title: str
    about: str
    rows: str
    hot_plug: str
    doorbell: str
    limit: Stop
    points: list[Point]
    map: AddressMap


class DoorbellResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to tell the host: what it costs, what it takes, what was said of it."""

    name: str
    title: str
    rows: str
    nested: bool
    assigned: bool
    remark: str
    limit: Stop
    quantities: Quantities


class LoadPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Interrupts of so many devices under a load (1 = all of a CPU)."""

    scheme: str
    devices: int
    load: float
    quantities: Quantities


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sentence on record, and what comes out when its number is worked out."""

    row: str
    sentence: str
    source: str
    recorded: str
    quantity: Quantity
    holds: bool
    note: str


class MeasuredPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A real guest with so many devices; `stopped`: why it was not to be had."""

    layout: str
    guest: str
    devices: int
    stopped: str | None
    quantities: Quantities


class MeasuredLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A real guest with so many messages under way at once, all the time."""

    layout: str
    guest: str
    devices: int
    in_flight: int
    quantities: Quantities


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found on real guests of one machine, and what was not, and why."""

    machine: str
    points: list[MeasuredPoint]
    loads: list[MeasuredLoad]
    not_measured: dict[str, str]


class PlatformResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine that was laid out on."""

    name: str
    about: str
    cpus: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything one run found. `interrupted`: ended early; what is there is whole."""

    version: int
    created: str
    interrupted: bool
    platform: PlatformResult
    costs: Costs
    claims: list[Claim]
    layouts: list[LayoutResult]
    doorbells: list[DoorbellResult]
    loads: list[LoadPoint]
    measured: Measured | None = None


_T = TypeVar("_T")


def modelled(value: float, unit: str) -> Quantity:
    """Give a number that comes from a model."""
    return Quantity(unit, modelled=value)


def missing(unit: str, why: str) -> Quantity:
    """Give a number that could not be had."""
    return Quantity(unit, missing=why)


def encode(value: Report | Costs) -> str:
    """Give the JSON text, for people to read too."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def load(path: Path, kind: type[_T]) -> _T:
    """Read what `encode` wrote. Raises InvalidError naming the file, OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise InvalidError(f"{path}: {error}") from None


def schema() -> dict[str, Any]:
    """Give the JSON schema of a report."""
    made = msgspec.json.schema(Report)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vbus compare, version 1",
        **made,
    }


SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def schema_text() -> str:
    """Give the published form of the schema."""
    return json.dumps(schema(), indent=2) + "\n"
