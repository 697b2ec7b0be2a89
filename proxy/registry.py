"""Drivers of devices: found by the device's type string, run as one task per device.

A driver is a class that takes the device and its options and has an async `run`. It is
started when the device comes, cancelled when the device goes, and its failure is its
own: no other device notices.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

import trio

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy
from vbus.errors import InvalidError

ENTRY_POINT_GROUP = "vbus.drivers"

log = logging.getLogger(__name__)

Options = Mapping[str, object]
"""What the guest's administrator says about one device; each driver knows its own."""


@runtime_checkable
class Driver(Protocol):
    """What runs for one device. It closes the device before it ends."""

    async def run(self, started: Callable[[str], None]) -> None:
        """Drive the device until cancelled; call `started` with a word about it.

        Whatever it raises ends this driver only; what it raises once the device is
        gone is of no interest.
        """

    def statistics(self) -> object:
        """Give a frozen dataclass of counters, or a dict."""


DriverClass = Callable[[DeviceProxy, Options], Driver]


class State(Enum):
    """Where a device's driver is: the last four are ends."""

    STARTING = "starting"
    RUNNING = "running"
    UNKNOWN_TYPE = "unknown-type"
    FAILED = "failed"
    ENDED = "ended"
    GONE = "gone"
    """The device has left the bus, and the driver has let go of it."""


@dataclass(frozen=True)
class Report:
    """A device's driver has a new state."""

    device: DeviceProxy
    state: State
    detail: str = ""


def installed_drivers() -> dict[str, EntryPoint]:
    """Find the drivers of all installed distributions; none is imported yet."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


class _Run:
    """One device and the task of its driver."""

    def __init__(self, device: DeviceProxy) -> None:
        self.device = device
        self.scope = trio.CancelScope()
        self.driver: Driver | None = None
        self.state = State.STARTING


class DriverHost:
    """Runs the drivers of all devices of one bridge."""

    def __init__(
        self,
        bridge: BridgeDriver,
        drivers: Mapping[str, DriverClass | EntryPoint] | None = None,
        options: Mapping[str, Options] | None = None,
        report: Callable[[Report], object] = lambda _: None,
        *,
        defaults: Mapping[str, Options] | None = None,
    ) -> None:
        """Take `drivers` by type string (default: those installed).

        A driver gets the `options` by device name over the `defaults` by type.
        """
        self._bridge = bridge
        self._drivers: dict[str, DriverClass | EntryPoint] = dict(
            installed_drivers() if drivers is None else drivers
        )
        self._options = options or {}
        self._defaults = defaults or {}
        self._report = report
        self._runs: dict[int, _Run] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Run drivers until cancelled; then every device is closed before it ends."""
        async with trio.open_nursery() as self._nursery:
            with self._bridge.observed(self):
                await trio.sleep_forever()

    @property
    def drivers(self) -> dict[str, Driver]:
        """The drivers that run now, by device name."""
        return {
            run.device.name: run.driver
            for run in self._runs.values()
            if run.driver is not None and run.state is State.RUNNING
        }

    # Told by the bridge driver

    def added(self, device: DeviceProxy) -> None:
        """Start the driver of a new device."""
        assert self._nursery is not None
        run = self._runs[device.id] = _Run(device)
        self._nursery.start_soon(self._drive, run)

    def dropped(self, device: DeviceProxy) -> None:
        """Cancel the driver of a device that is gone."""
        self._runs[device.id].scope.cancel()

    # One device

    async def _drive(self, run: _Run) -> None:
        self._change(run, State.STARTING)
        try:
            with run.scope:
                await self._run_to_its_end(run)
                await trio.sleep_forever()
        finally:
            if run.device.gone.is_set():
                self._change(run, State.GONE)
                del self._runs[run.device.id]
            elif run.state is State.RUNNING:
                self._change(run, State.ENDED)

    async def _run_to_its_end(self, run: _Run) -> None:
        try:
            driver_class = self._find(run.device.type)
            if driver_class is None:
                self._change(run, State.UNKNOWN_TYPE)
            else:
                await self._run(run, driver_class)
                self._change(run, State.ENDED)
        except* Exception as errors:
            if not run.device.gone.is_set():
                log.debug("%r: its driver failed", run.device, exc_info=errors)
                self._change(run, State.FAILED, _describe(errors))

    async def _run(self, run: _Run, driver_class: DriverClass) -> None:
        defaults = self._defaults.get(run.device.type, {})
        options = self._options.get(run.device.name, {})
        run.driver = driver_class(run.device, {**defaults, **options})
        try:
            await run.driver.run(lambda word: self._change(run, State.RUNNING, word))
        finally:
            await run.device.close()

    def _find(self, type: str) -> DriverClass | None:
        found = self._drivers.get(type)
        if isinstance(found, EntryPoint):
            loaded = found.load()
            if not callable(loaded):
                raise InvalidError(f"the driver of {type!r} cannot be called: {found}")
            found = self._drivers[type] = loaded
        return found

    def _change(self, run: _Run, state: State, detail: str = "") -> None:
        run.state = state
        self._report(Report(run.device, state, detail))

    def statistics(self) -> dict[str, object]:
        """By device: its type, its driver's state, and what the driver counts."""
        return {
            run.device.name: {
                "id": run.device.id,
                "type": run.device.type,
                "state": run.state.value,
                "device": run.device.statistics(),
                "driver": run.driver.statistics() if run.driver is not None else {},
            }
            for run in self._runs.values()
        }


def _describe(error: BaseException) -> str:
    """One line about an error, however many are in it."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_describe(each) for each in error.exceptions)
    return str(error) or type(error).__name__
