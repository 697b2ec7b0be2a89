"""The bus model: names, ids, links, uses and who is told (R2, R11)."""

from collections.abc import Callable

import pytest

from vbus import Device, attribute, bus
from vbus.bus import BusModel, Change, ChangeKind, Interface
from vbus.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    PermissionDeniedError,
)


class Switch(Device):
    """Managed, but without an interface of its own."""


class Port(Device):
    type = "virtual-ethernet"
    switch = attribute(str)
    log: list[str]

    def setup(self) -> None:
        self.log = ["setup"]
        self.upper = self.host.device(self.switch)

    def teardown(self) -> None:
        self.log.append("teardown")


class OtherPort(Port):
    """A second class behind the same interface type."""


@pytest.fixture
def model() -> BusModel:
    model = BusModel({"switch": Switch, "port": Port, "other": OtherPort})
    model.add_bus("bus0")
    model.add_bus("bus1")
    model.add_device("lan0", "switch")
    return model


def add_port(model: BusModel, name: str, class_name: str = "port") -> Port:
    port = model.add_device(name, class_name, {"switch": "lan0"})
    assert isinstance(port, Port)
    return port


class Recorder:
    def __init__(self) -> None:
        self.log: list[tuple[str, int, str]] = []

    def added(self, interface: Interface) -> None:
        self.log.append(("added", interface.id, interface.name))

    def dropped(self, interface: Interface) -> None:
        self.log.append(("dropped", interface.id, interface.name))


@pytest.mark.parametrize("name", ["a", "0", "lan0.port-1_x", "a" * 63])
def test_good_names(model: BusModel, name: str) -> None:
    model.add_device(name, "switch")
    model.add_bus(name)


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "A", "a b", "a/b", "é", "a\n", "a" * 64]
)
def test_bad_names(model: BusModel, name: str) -> None:
    with pytest.raises(InvalidError, match="bad name"):
        model.add_device(name, "switch")
    with pytest.raises(InvalidError, match="bad name"):
        model.add_bus(name)


def test_names_are_unique(model: BusModel) -> None:
    with pytest.raises(ExistsError):
        model.add_device("lan0", "switch")
    with pytest.raises(ExistsError):
        model.add_bus("bus0")


@pytest.mark.parametrize(
    "operation",
    [
        lambda model: model.add_device("x", "nonesuch"),
        lambda model: model.remove_device("x"),
        lambda model: model.link("bus0", "x"),
        lambda model: model.link("nonesuch", "lan0"),
        lambda model: model.unlink("bus0", "lan0"),
        lambda model: model.remove_bus("x"),
        lambda model: model.set_attribute("x", "a", 1),
        lambda model: model.bus("bus0").interface(0),
        lambda model: model.bus("bus0").find("lan0"),
    ],
)
def test_what_is_not_there(
    model: BusModel, operation: Callable[[BusModel], object]
) -> None:
    with pytest.raises(NotFoundError):
        operation(model)


def test_ids_count_from_zero_per_bus_and_are_never_reused(model: BusModel) -> None:
    """R2."""
    for name in ("p0", "p1", "p2"):
        add_port(model, name)
    assert [model.link("bus0", name).id for name in ("p0", "p1")] == [0, 1]
    model.unlink("bus0", "p1")
    assert model.link("bus0", "p1").id == 2
    assert model.link("bus0", "p2").id == 3
    assert model.link("bus1", "p0").id == 0  # one device on two buses
    assert {bus.name for bus, _ in model.links(model.device("p0"))} == {"bus0", "bus1"}


def test_ids_end(model: BusModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "ID_LIMIT", 1)
    add_port(model, "p0")
    model.link("bus0", "p0")
    model.unlink("bus0", "p0")
    with pytest.raises(NoSpaceError):
        model.link("bus0", "p0")


def test_several_classes_stand_behind_one_type(model: BusModel) -> None:
    """R2: the string is the interface type, not the implementation."""
    add_port(model, "p0")
    add_port(model, "p1", "other")
    types = {model.link("bus0", name).type for name in ("p0", "p1")}
    assert types == {"virtual-ethernet"}
    assert model.class_name(model.device("p1")) == "other"


def test_a_device_without_a_type_cannot_be_linked(model: BusModel) -> None:
    with pytest.raises(InvalidError, match="no interface"):
        model.link("bus0", "lan0")


def test_a_link_is_made_once(model: BusModel) -> None:
    add_port(model, "p0")
    model.link("bus0", "p0")
    with pytest.raises(ExistsError):
        model.link("bus0", "p0")


@pytest.mark.parametrize("kind", ["x" * 128, "é" * 64, "a\0b"])
def test_a_type_must_fit_into_devadd(model: BusModel, kind: str) -> None:
    """At most 127 bytes of UTF-8."""
    model.classes["long"] = type("Long", (Device,), {"type": kind})
    with pytest.raises(InvalidError, match="interface type"):
        model.add_device("long0", "long")
    model.classes["fits"] = type("Fits", (Device,), {"type": "x" * 127})
    model.add_device("fits0", "fits")


def test_a_device_in_use_cannot_be_removed(model: BusModel) -> None:
    """R11: the switch stays as long as it has ports."""
    add_port(model, "p0")
    with pytest.raises(BusyError, match="used by p0"):
        model.remove_device("lan0")
    model.remove_device("p0")
    model.remove_device("lan0")
    assert model.devices == {}


def test_a_device_whose_setup_fails_is_not_there(model: BusModel) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        model.add_device("p0", "port", {"switch": "nowhere"})
    with pytest.raises(InvalidError, match="missing"):
        model.add_device("p0", "port")
    with pytest.raises(InvalidError, match="itself"):
        model.add_device("p0", "port", {"switch": "p0"})
    assert list(model.devices) == ["lan0"]
    model.remove_device("lan0")


def test_removal_unlinks_then_tears_down(model: BusModel) -> None:
    port = add_port(model, "p0")
    recorder = Recorder()
    model.bus("bus0").subscribe(recorder)
    model.link("bus0", "p0")
    model.link("bus1", "p0")
    model.remove_device("p0")
    assert recorder.log == [("added", 0, "p0"), ("dropped", 0, "p0")]
    assert port.log == ["setup", "teardown"]
    assert not model.bus("bus1").interfaces


def test_only_subscribers_of_that_bus_are_told(model: BusModel) -> None:
    add_port(model, "p0")
    here, elsewhere, gone = Recorder(), Recorder(), Recorder()
    model.bus("bus0").subscribe(here)
    model.bus("bus1").subscribe(elsewhere)
    model.bus("bus0").subscribe(gone)
    model.bus("bus0").unsubscribe(gone)
    model.link("bus0", "p0")
    assert here.log == [("added", 0, "p0")]
    assert elsewhere.log == gone.log == []


def test_a_bus_in_use_cannot_be_removed(model: BusModel) -> None:
    add_port(model, "p0")
    recorder = Recorder()
    model.bus("bus0").subscribe(recorder)
    model.link("bus1", "p0")
    for name in ("bus0", "bus1"):
        with pytest.raises(BusyError):
            model.remove_bus(name)
    model.bus("bus0").unsubscribe(recorder)
    model.unlink("bus1", "p0")
    model.remove_bus("bus0")
    model.remove_bus("bus1")
    assert model.buses == {}


def test_watchers_hear_every_change(model: BusModel) -> None:
    """What starts a device's task, and what `vbus events` prints."""
    changes: list[Change] = []
    stop = model.watch(changes.append)
    add_port(model, "p0")
    model.link("bus0", "p0")
    model.remove_device("p0")
    model.add_bus("bus2")
    model.remove_bus("bus2")
    stop()
    model.add_bus("bus3")
    assert [change.kind.value for change in changes] == [
        "device-added",
        "linked",
        "unlinked",
        "device-removed",
        "bus-added",
        "bus-removed",
    ]
    assert changes[1] == Change(ChangeKind.LINKED, bus="bus0", device="p0", id=0)


def test_attributes_are_set_through_the_model(model: BusModel) -> None:
    changes: list[Change] = []

    class Knob(Device):
        level = attribute(int, default=1, writable=True)
        fixed = attribute(int, default=1)

    model.classes["knob"] = Knob
    model.add_device("k0", "knob", {"level": "0x10"})
    model.watch(changes.append)
    assert model.device("k0").get_attribute("level") == 16
    model.set_attribute("k0", "level", 5)
    assert model.device("k0").get_attribute("level") == 5
    with pytest.raises(PermissionDeniedError):
        model.set_attribute("k0", "fixed", 5)
    assert changes == [
        Change(ChangeKind.DEVICE_CHANGED, device="k0", attribute="level")
    ]


def test_entry_points_are_loaded_on_first_use() -> None:
    """R11: classes of any installed distribution, by name."""
    from importlib.metadata import EntryPoint

    group = bus.ENTRY_POINT_GROUP
    model = BusModel(
        {
            "sample": EntryPoint("sample", "vbus.device:Device", group),
            "wrong": EntryPoint("wrong", "vbus.bus:Bus", group),
        }
    )
    assert isinstance(model.classes["sample"], EntryPoint)
    assert model.device_class("sample") is Device
    assert model.classes["sample"] is Device
    with pytest.raises(InvalidError, match="no Device"):
        model.device_class("wrong")
