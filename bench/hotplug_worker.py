"""A guest to whose bus many devices are added: `Worker("hotplug_worker", ...)`.

Arguments: its socket, the control socket, the number of devices. The time runs from the
first request to add one until the guest's driver has opened the last.
"""

import sys
import time
from collections.abc import Callable, Mapping

import trio

from bench.processes import report
from proxy.device import DeviceProxy
from proxy.guest import attach
from proxy.registry import DriverHost, Report, State
from vbus.control.client import ControlClient


class Opener:
    """The least a driver can do: it opens its device."""

    def __init__(self, device: DeviceProxy, options: Mapping[str, object]) -> None:
        self._device = device

    async def run(self, started: Callable[[str], None]) -> None:
        async with self._device.opened():
            started("open")
            await trio.sleep_forever()

    def statistics(self) -> object:
        return {}


class Count:
    """Notes when the last of so many devices is open."""

    def __init__(self, devices: int) -> None:
        self._missing = devices
        self.complete = trio.Event()

    def __call__(self, report: Report) -> None:
        if report.state is State.FAILED:
            raise RuntimeError(f"{report.device.name}: {report.detail}")
        if report.state is State.RUNNING:
            self._missing -= 1
            if self._missing == 0:
                self.complete.set()


async def plug(socket: str, control: str, devices: int) -> None:
    """Add devices one request after the other, while the guest opens them."""
    count = Count(devices)
    async with (
        attach(socket) as bridge,
        ControlClient(control) as daemon,
        trio.open_nursery() as nursery,
    ):
        host = DriverHost(bridge, {"org.vbus.echo": Opener}, report=count)
        nursery.start_soon(host.run)
        begin = time.perf_counter_ns()
        for nth in range(devices):
            await daemon.request(
                "device.add", name=f"echo{nth}", class_name="echo", buses=["bus0"]
            )
        await count.complete.wait()
        took = time.perf_counter_ns() - begin
        nursery.cancel_scope.cancel()
    report({"us_per_device": took / devices / 1000})


if __name__ == "__main__":
    trio.run(plug, sys.argv[1], sys.argv[2], int(sys.argv[3]))
