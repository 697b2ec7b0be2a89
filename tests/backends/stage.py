"""A bus with devices whose tasks run, and a guest's driver for them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio
import trio.testing

from backends.venet import Switch, SwitchTap, Venet, VenetLoopback, VenetTap
from tests.backends.driver import Driver, Modes
from vbus.bus import BusModel
from vbus.device import Device
from vbus.testing import NurseryEffects, RecordedBridge

CLASSES: dict[str, type[Device]] = {
    "switch": Switch,
    "switch-tap": SwitchTap,
    "venet": Venet,
    "venet-tap": VenetTap,
    "venet-loopback": VenetLoopback,
}


class Stage:
    """The model, one guest's peer, and the failures of devices' tasks."""

    def __init__(self, recorded: RecordedBridge, effects: NurseryEffects) -> None:
        self.recorded = recorded
        self.model = recorded.model
        self.peer = recorded.peer
        self.effects = effects

    def device(self, name: str) -> Device:
        return self.model.device(name)

    async def settle(self) -> None:
        """Let every task come to rest, and the guest take its events."""
        await trio.testing.wait_all_tasks_blocked()
        self.peer.take_events()
        await trio.testing.wait_all_tasks_blocked()
        self.recorded.check()

    async def driver(self, devid: int = 0, modes: Modes | None = None) -> Driver:
        """Open a venet and bring its link up."""
        driver = Driver(self.peer, devid, modes or Modes())
        await driver.start()
        await self.settle()
        return driver

    def failures(self) -> list[Exception]:
        return [error for _, error in self.effects.failures]


@asynccontextmanager
async def staged(
    devices: Mapping[str, tuple[str, Mapping[str, object]]],
) -> AsyncIterator[Stage]:
    """Make devices, name -> (class, attributes), linked in this order if they can."""
    async with trio.open_nursery() as nursery:
        effects = NurseryEffects(nursery)
        with RecordedBridge(model=BusModel(CLASSES), effects=effects) as recorded:
            effects.failed = recorded.bridge.connection_failed
            for name, (class_name, attributes) in devices.items():
                device = recorded.model.add_device(name, class_name, attributes)
                if device.overrides("serve"):
                    nursery.start_soon(device.serve)
                if device.type:
                    recorded.model.link(recorded.bus.name, name)
            await recorded.peer.start()
            try:
                yield Stage(recorded, effects)
                await trio.testing.wait_all_tasks_blocked()
            finally:
                for device in recorded.model.devices.values():
                    device.teardown()
        nursery.cancel_scope.cancel()


LOOPBACK = {"loop0": ("venet-loopback", {})}
TWO_PORTS = {
    "lan0": ("switch", {}),
    "port0": ("venet", {"switch": "lan0", "client_mac": "02:00:00:00:00:0a"}),
    "port1": ("venet", {"switch": "lan0", "client_mac": "02:00:00:00:00:0b"}),
}
