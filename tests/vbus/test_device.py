"""What a device author relies on: attributes, calls, and the size of an echo device."""

import inspect
from ipaddress import IPv4Address

import pytest
import trio

import vbus
from vbus import Connection, Device, attribute, call
from vbus.abi import TYPE_LIMIT
from vbus.bus import BusModel
from vbus.errors import BusyError, InvalidError, NotFoundError, PermissionDeniedError
from vbus.testing import RecordedBridge, now


class Base(Device):
    type = "org.vbus.test"
    count = attribute(int, default=10, writable=True)
    fixed = attribute(bool, default=False)
    label = attribute(str, default="", writable=True, writable_while_open=False)
    address = attribute(IPv4Address, default=IPv4Address("10.0.0.1"), writable=True)

    def attribute_changed(self, name: str) -> None:
        if name == "count" and self.count > 100:
            raise InvalidError("at most 100")


class Derived(Base):
    """Adds one attribute, makes another one required."""

    count = attribute(int)
    extra = attribute(str, default="x")


class NoHost:
    def device(self, name: str) -> Device:
        raise NotFoundError(name)


def make(**attributes: object) -> Base:
    return Base("base0", NoHost(), **attributes)


def test_defaults_and_values() -> None:
    device = make(count="0x20", fixed="on")
    assert (device.count, device.fixed, device.label) == (32, True, "")
    assert make().count == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "ten"),
        ("count", True),
        ("count", 1.5),
        ("count", None),
        ("fixed", "maybe"),
        ("fixed", 2),
        ("label", 5),
        ("address", "10.0.0.256"),
    ],
)
def test_bad_values_name_the_attribute(name: str, value: object) -> None:
    with pytest.raises(InvalidError, match=f"^{name}: "):
        make(**{name: value})


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("yes", True), ("Off", False), (0, False), (True, True)],
)
def test_words_for_booleans(value: object, expected: bool) -> None:
    assert make(fixed=value).fixed is expected


@pytest.mark.parametrize("name", ["unknown", "name", "host", "attributes", "calls"])
def test_unknown_attributes_are_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="no attribute"):
        make(**{name: 1})
    with pytest.raises(InvalidError, match="no attribute"):
        make().get_attribute(name)


def test_inheritance_adds_and_replaces() -> None:
    assert list(Derived.attributes) == ["count", "fixed", "label", "address", "extra"]
    with pytest.raises(InvalidError, match="'count' is missing"):
        Derived("d", NoHost())
    assert Derived("d", NoHost(), count=1).extra == "x"


def test_setting() -> None:
    device = make()
    device.set_attribute("count", "7")
    assert device.count == 7
    with pytest.raises(InvalidError, match="at most 100"):
        device.set_attribute("count", 101)
    assert device.count == 7
    with pytest.raises(PermissionDeniedError):
        device.set_attribute("fixed", True)


def test_the_device_itself_sets_what_it_likes() -> None:
    device = make()
    device.fixed = True
    assert device.get_attribute("fixed") is True


def test_not_writable_while_open() -> None:
    """As the client_mac of venet (ABI 9.3)."""
    with RecordedBridge({"base": Base}) as recorded:
        recorded.add("base0", "base")
        now(recorded.peer.start())
        handle = now(recorded.peer.open(0))
        with pytest.raises(BusyError):
            recorded.model.set_attribute("base0", "label", "new")
        recorded.model.set_attribute("base0", "count", 3)
        now(recorded.peer.close_device(handle))
        recorded.model.set_attribute("base0", "label", "new")


class Thermostat(Device):
    """Refuses what does not go together, and notes what it was told."""

    low = attribute(int, default=10, writable=True)
    high = attribute(int, default=20, writable=True)
    place = attribute(str, default="hall")

    def setup(self) -> None:
        self.told: list[tuple[int, int]] = []

    def attribute_changed(self, name: str) -> None:
        self.told.append((self.low, self.high))
        if self.low > self.high:
            raise InvalidError(f"{self.low} is over {self.high}")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"high": 30, "low": "many"}, InvalidError),
        ({"high": 30, "nonesuch": 1}, InvalidError),
        ({"high": 30, "place": "cellar"}, PermissionDeniedError),
        ({"high": 30, "low": 40}, InvalidError),
    ],
)
def test_several_attributes_are_set_all_or_none(
    values: dict[str, object], error: type[Exception]
) -> None:
    """R11: a refusal leaves everything as it was, and the device knows."""
    model = BusModel({"thermostat": Thermostat})
    device = model.add_device("t", "thermostat")
    assert isinstance(device, Thermostat)
    told: list[object] = []
    model.watch(told.append)
    with pytest.raises(error):
        model.set_attributes("t", values)
    assert (device.low, device.high) == (10, 20)
    assert told == []
    assert model.given(device) == {}
    assert device.told == [] or device.told[-1] == (10, 20)
    model.set_attributes("t", {"high": "50", "low": 40})
    assert (device.low, device.high) == (40, 50)
    assert len(told) == 2
    assert model.given(device) == {"high": "50", "low": 40}


# Calls


class Calls(Device):
    type = "org.vbus.calls"

    @call(1)
    def one(self, connection: Connection, data: bytes) -> int:
        return 1

    @call(2)
    def two(self, connection: Connection, data: bytes, flags: int) -> int:
        return flags


class MoreCalls(Calls):
    def one(self, connection: Connection, data: bytes) -> int:
        return 11

    @call(3)
    async def three(self, connection: Connection, data: bytes) -> int:
        await trio.lowlevel.checkpoint()
        return 3


async def test_calls_are_found_by_number_and_inherited() -> None:
    """R4."""
    with RecordedBridge({"calls": MoreCalls}) as recorded:
        recorded.add("calls0", "calls")
        peer = recorded.peer
        await peer.start()
        handle = await peer.open(0)
        assert (await peer.call(handle, 1))[0] == 11
        assert (await peer.call(handle, 2, flags=22))[0] == 22
        assert (await peer.call(handle, 3))[0] == 3
        with pytest.raises(OSError, match="Invalid"):
            await peer.call(handle, 4)
    assert 3 not in Calls.calls


def test_tasks_are_made_only_for_hooks_that_exist() -> None:
    assert not Calls.overrides("serve")
    assert not Calls.overrides("run")

    class Busy(Calls):
        async def serve(self) -> None: ...

    assert Busy.overrides("serve")


def test_what_an_author_imports() -> None:
    for name in vbus.__all__:
        assert getattr(vbus, name) is not None
    with pytest.raises(AttributeError):
        vbus.nothing  # noqa: B018


def test_interface_types_have_a_limit() -> None:
    BusModel({"b": type("B", (Device,), {"type": "x" * TYPE_LIMIT})}).add_device(
        "b", "b"
    )


def test_every_hook_is_documented() -> None:
    for name, member in vars(Device).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            assert member.__doc__, name
