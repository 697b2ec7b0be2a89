"""What is planned: nothing for what is the same, the rest in an order that works."""

from collections.abc import Collection, Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.config import BusConfig, Config, DeviceConfig, GuestConfig
from vbus.control.plan import Attributes, Running, Step, check_names, plan
from vbus.errors import InvalidError

SETTABLE = "level"


def compare(old: DeviceConfig, new: DeviceConfig) -> Attributes:
    """Only `level` can be set."""
    differing = {
        name: (old.attributes.get(name), new.attributes.get(name))
        for name in old.attributes.keys() | new.attributes.keys()
        if old.attributes.get(name) != new.attributes.get(name)
    }
    changes = {name: pair for name, pair in differing.items() if name == SETTABLE}
    fixed = {name: pair for name, pair in differing.items() if name != SETTABLE}
    return Attributes({name: pair[1] for name, pair in changes.items()}, changes, fixed)


def steps(
    actual: Config,
    desired: Config,
    *,
    users: Mapping[str, Collection[str]] | None = None,
    in_use: Mapping[str, Collection[str]] | None = None,
    attached: Collection[str] = (),
) -> list[Step]:
    return plan(actual, desired, Running(users or {}, in_use or {}, attached, compare))


def short(found: list[Step]) -> list[str]:
    return [f"{step.op} {step.about.split()[-1]}" for step in found]


def device(name: str, *buses: str, cls: str = "lamp", **values: object) -> DeviceConfig:
    return DeviceConfig(name, cls, buses, values)


LAN = Config(
    buses=(BusConfig("b"),),
    devices=(device("lan", cls="switch"), device("port", "b", level=1, switch="lan")),
    guests=(GuestConfig("g", "b"),),
)
USERS = {"lan": {"port"}}


def test_nothing_is_to_be_done_for_what_is_the_same() -> None:
    assert steps(LAN, LAN, users=USERS, in_use={"port": {"g"}}, attached={"g"}) == []


def test_what_comes_and_goes_does_so_in_an_order_that_works() -> None:
    assert short(steps(Config(), LAN)) == [
        "bus.add b",
        "device.add lan",
        "device.add port",
        "guest.add g",
    ]
    assert short(steps(LAN, Config(), users=USERS)) == [
        "guest.remove g",
        "device.remove port",
        "device.remove lan",
        "bus.remove b",
    ]


def test_a_settable_attribute_is_set_and_no_more() -> None:
    port = device("port", "b", level=2, switch="lan")
    desired = msgspec.structs.replace(LAN, devices=(LAN.devices[0], port))
    [step] = steps(LAN, desired, users=USERS, in_use={"port": {"g"}})
    assert step.op == "device.set"
    assert step.args == {"name": "port", "attributes": {"level": 2}}
    assert step.changes == {"level": (1, 2)}
    assert step.in_use == ()


def test_links_change_without_the_device() -> None:
    moved = msgspec.structs.replace(
        LAN,
        buses=(BusConfig("b"), BusConfig("c")),
        devices=(LAN.devices[0], device("port", "c", level=1, switch="lan")),
    )
    assert short(steps(LAN, moved)) == [
        "device.unlink port",
        "bus.add c",
        "device.link port",
    ]


def test_what_cannot_be_changed_is_made_anew_with_all_that_use_it() -> None:
    """And is marked as in use if any of them is."""
    lan = device("lan", cls="switch", size=3)
    desired = msgspec.structs.replace(LAN, devices=(lan, LAN.devices[1]))
    found = steps(LAN, desired, users=USERS, in_use={"port": {"g"}})
    assert short(found) == [
        "device.remove port",
        "device.remove lan",
        "device.add lan",
        "device.add port",
    ]
    assert [step.in_use for step in found[:2]] == [("g",), ("g",)]
    assert found[1].changes == {"size": (None, 3)}
    assert not any(step.in_use for step in steps(LAN, desired, users=USERS))


def test_another_class_is_another_device() -> None:
    desired = msgspec.structs.replace(
        LAN, devices=(LAN.devices[0], device("port", "b", cls="fan"))
    )
    remove, add = steps(LAN, desired, users=USERS)
    assert (remove.op, add.op) == ("device.remove", "device.add")
    assert remove.changes == {"class_name": ("lamp", "fan")}


def test_a_guest_that_differs_is_made_anew() -> None:
    other = msgspec.structs.replace(LAN, guests=(GuestConfig("g", "b", msix=False),))
    remove, add = steps(LAN, other, attached={"g"})
    assert (remove.op, remove.in_use) == ("guest.remove", ("g",))
    assert remove.changes == {"msix": (True, False)}
    assert add.op == "guest.add"
    assert steps(LAN, other)[0].in_use == ()


def test_names_that_are_nowhere_are_refused() -> None:
    with pytest.raises(InvalidError, match="device d: no bus 'x'"):
        check_names(Config(devices=(device("d", "x"),)))
    with pytest.raises(InvalidError, match="guest g: no bus 'x'"):
        check_names(Config(guests=(GuestConfig("g", "x"),)))


# Any state from any other


class World:
    """What a daemon would allow: a step in the wrong order is refused."""

    def __init__(self, config: Config, users: Mapping[str, Collection[str]]) -> None:
        self.buses = {bus.name for bus in config.buses}
        self.devices = {one.name: one for one in config.devices}
        self.guests = {one.name: one for one in config.guests}
        self.users = users

    def do(self, step: Step) -> None:
        noun, _, verb = step.op.partition(".")
        getattr(self, f"{noun}_{verb}")(step.args)

    def bus_add(self, args: dict[str, object]) -> None:
        assert args["name"] not in self.buses
        self.buses.add(str(args["name"]))

    def bus_remove(self, args: dict[str, object]) -> None:
        name = str(args["name"])
        assert all(name not in one.buses for one in self.devices.values())
        assert all(name != one.bus for one in self.guests.values())
        self.buses.remove(name)

    def device_add(self, args: dict[str, object]) -> None:
        one = msgspec.convert(args, DeviceConfig)
        assert one.name not in self.devices
        assert set(one.buses) <= self.buses
        self.devices[one.name] = one

    def device_remove(self, args: dict[str, object]) -> None:
        name = str(args["name"])
        assert not set(self.users.get(name, ())) & self.devices.keys()
        del self.devices[name]

    def device_set(self, args: dict[str, object]) -> None:
        one = self.devices[str(args["name"])]
        assert isinstance(args["attributes"], dict)
        merged = {**one.attributes, **args["attributes"]}
        known = {name: value for name, value in merged.items() if value is not None}
        changed = msgspec.structs.replace(one, attributes=known)
        self.devices[one.name] = changed

    def device_link(self, args: dict[str, object]) -> None:
        one, bus = self.devices[str(args["device"])], str(args["bus"])
        assert bus in self.buses
        assert bus not in one.buses
        changed = msgspec.structs.replace(one, buses=(*one.buses, bus))
        self.devices[one.name] = changed

    def device_unlink(self, args: dict[str, object]) -> None:
        one, bus = self.devices[str(args["device"])], str(args["bus"])
        left = list(one.buses)
        left.remove(bus)
        self.devices[one.name] = msgspec.structs.replace(one, buses=tuple(left))

    def guest_add(self, args: dict[str, object]) -> None:
        one = msgspec.convert(args["guest"], GuestConfig)
        assert one.bus in self.buses
        assert one.name not in self.guests
        self.guests[one.name] = one

    def guest_remove(self, args: dict[str, object]) -> None:
        del self.guests[str(args["name"])]

    def same_as(self, config: Config) -> bool:
        return (
            self.buses == {bus.name for bus in config.buses}
            and self.guests == {one.name: one for one in config.guests}
            and {name: _plain(one) for name, one in self.devices.items()}
            == {one.name: _plain(one) for one in config.devices}
        )


def _plain(one: DeviceConfig) -> tuple[object, ...]:
    return one.class_name, frozenset(one.buses), dict(one.attributes)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    buses = draw(st.sets(st.sampled_from("abc"), min_size=1))
    on = st.lists(st.sampled_from(sorted(buses)), unique=True).map(tuple)
    values = st.dictionaries(
        st.sampled_from([SETTABLE, "size"]), st.integers(0, 2), max_size=2
    )
    devices = draw(
        st.dictionaries(
            st.sampled_from(["d0", "d1", "d2", "d3"]),
            st.tuples(st.sampled_from(["lamp", "fan"]), on, values),
        )
    )
    guests = draw(
        st.dictionaries(
            st.sampled_from(["g0", "g1"]),
            st.tuples(st.sampled_from(sorted(buses)), st.booleans()),
        )
    )
    return Config(
        buses=tuple(BusConfig(name) for name in sorted(buses)),
        devices=tuple(DeviceConfig(name, *about) for name, about in devices.items()),
        guests=tuple(GuestConfig(name, *about) for name, about in guests.items()),
    )


@given(configs(), configs())
def test_from_any_state_to_any_other_every_step_can_be_done(
    actual: Config, desired: Config
) -> None:
    """R11: each device uses the one before it, unless that one is to be gone."""
    left = {one.name for one in desired.devices}
    users = {
        f"d{n}": {f"d{n + 1}"}
        for n in range(3)
        if f"d{n}" in left or f"d{n + 1}" not in left
    }
    world = World(actual, users)
    for step in steps(actual, desired, users=users):
        world.do(step)
    assert world.same_as(desired)
    assert steps(desired, desired, users=users) == []
