"""A guest to whose bus many devices are added: `Worker("hotplug_worker", ...)`.

Arguments: its socket, the control socket, the number of devices. The time runs from the
first request to add one until the guest's driver has opened the last.
"""

from collections.abc import Callable, Mapping

import trio

from proxy.device import DeviceProxy


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
