"""Drivers: matched by type string, one task per device, none harming another."""

from collections.abc import Callable

import pytest
import trio
import trio.testing

from proxy.drivers.echo import EchoDriver
from proxy.guest import attach
from proxy.registry import DriverHost, Report, State, installed_drivers
from proxy.tasks import beside
from tests.proxy.host import Host
from vbus.device import Device
from vbus.errors import NoDeviceError


class Other(Device):
    type = "org.example.other"


class Log:
    """The reports, and a way to wait for one."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, State]] = []
        self.details: dict[tuple[str, State], str] = {}
        self._changed = trio.lowlevel.ParkingLot()

    def __call__(self, report: Report) -> None:
        entry = (report.device.name, report.state)
        self.reports.append(entry)
        self.details[entry] = report.detail
        self._changed.unpark_all()

    async def until(self, name: str, state: State) -> str:
        with trio.fail_after(5):
            while (name, state) not in self.reports:
                await self._changed.park()
        return self.details[name, state]

    def of(self, name: str) -> list[State]:
        return [state for each, state in self.reports if each == name]


def test_the_drivers_are_found_by_entry_point() -> None:
    """R15: the type string of the interface, not the name of the class."""
    drivers = installed_drivers()
    assert drivers["org.vbus.echo"].load() is EchoDriver
    assert "virtual-ethernet" in drivers


async def test_a_driver_lives_as_long_as_its_device(host: Host) -> None:
    """R8: hot add starts it, hot drop cancels it and frees what it had."""
    path = await host.add_guest()
    log = Log()
    async with attach(path) as bridge:
        drivers = DriverHost(bridge, {"org.vbus.echo": EchoDriver}, report=log)
        async with beside(drivers.run):
            used = bridge.function.memory.statistics().used
            host.add("e1")
            await log.until("e1", State.RUNNING)
            echo = drivers.drivers["e1"]
            assert isinstance(echo, EchoDriver)
            for size in (1, 100, 2048):
                assert await echo.exchange(bytes(size)) == bytes(size)
            assert bridge.function.memory.statistics().used > used
            host.drop("e1")
            await log.until("e1", State.GONE)
            assert bridge.function.memory.statistics().used == used
            assert drivers.statistics() == {}
    assert log.of("e1") == [State.STARTING, State.RUNNING, State.GONE]


async def test_a_device_that_comes_when_the_drivers_have_ended_is_left_alone(
    host: Host,
) -> None:
    """R8: the bridge goes on telling, as long as it is attached."""
    log = Log()
    async with attach(await host.add_guest()) as bridge:
        drivers = DriverHost(bridge, {"org.vbus.echo": EchoDriver}, report=log)
        async with beside(drivers.run):
            host.add("e1")
            await log.until("e1", State.RUNNING)
        host.add("e2")
        host.drop("e1")
        assert (await bridge.device("e2")).type == "org.vbus.echo"
    assert log.of("e2") == []


async def test_a_type_without_a_driver_just_stays(host: Host) -> None:
    host.model.classes["other"] = Other
    host.add("o1", "other")
    log = Log()
    async with attach(await host.add_guest()) as bridge:
        drivers = DriverHost(bridge, {"org.vbus.echo": EchoDriver}, report=log)
        async with beside(drivers.run):
            await log.until("o1", State.UNKNOWN_TYPE)
            host.drop("o1")
            await log.until("o1", State.GONE)


async def test_a_driver_that_crashes_affects_only_its_device(host: Host) -> None:
    class Crash:
        def __init__(self, device: object, options: object) -> None:
            self.device = device

        async def run(self, started: Callable[[str], None]) -> None:
            await self.device.open()  # type: ignore[attr-defined]
            started("for a moment")
            raise ZeroDivisionError("of its own")

        def statistics(self) -> object:
            return {}

    host.model.classes["other"] = Other
    log = Log()
    drivers = {"org.vbus.echo": EchoDriver, "org.example.other": Crash}
    async with attach(await host.add_guest()) as bridge:
        host.add("e1")
        host.add("o1", "other")
        async with beside(DriverHost(bridge, drivers, report=log).run):
            assert await log.until("o1", State.FAILED) == "of its own"
            assert not bridge.devices[1].is_open
            assert await log.until("e1", State.RUNNING)
            host.add("e2")
            await log.until("e2", State.RUNNING)
            assert State.FAILED not in log.of("e1")


async def test_options_are_the_drivers_to_check(host: Host) -> None:
    host.add("e1")
    log = Log()
    async with attach(await host.add_guest()) as bridge:
        options = {"e1": {"colour": "blue"}}
        drivers = {"org.vbus.echo": EchoDriver}
        async with beside(DriverHost(bridge, drivers, options, log).run):
            assert "no option 'colour'" in await log.until("e1", State.FAILED)


async def test_every_driver_ends_when_the_host_goes(host: Host) -> None:
    host.add("e1")
    log = Log()
    path = await host.add_guest()

    async def guest() -> None:
        async with attach(path) as bridge:
            drivers = DriverHost(bridge, {"org.vbus.echo": EchoDriver}, report=log)
            async with beside(drivers.run):
                await log.until("e1", State.RUNNING)
                host.stop()
                await trio.sleep_forever()

    with pytest.raises(NoDeviceError, match="closed the connection"):
        await guest()
    assert log.of("e1")[-1] is State.GONE
