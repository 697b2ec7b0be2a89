"""A device's own mistakes in a backend cost what they cost in the daemon."""

import errno
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from proxy.device import DeviceProxy
from proxy.guest import attach
from tests.system.served import WITHIN_S, Served
from vbus.errors import BusyError, CallTimeoutError, NoDeviceError, VbusError

CONFIG = f"""
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
call_timeout_s = 0.3
[[backend]]
name = "far"
classes = ["clumsy"]
command = [
    "{sys.executable}", "-m", "vbus", "backend", "run",
    "--name", "far", "tests.system.clumsy:Clumsy",
]
[[device]]
name = "c0"
class = "clumsy"
bus = "bus0"
[[device]]
name = "c1"
class = "clumsy"
bus = "bus0"
"""


async def until_ended(device: DeviceProxy) -> None:
    with trio.fail_after(WITHIN_S), suppress(VbusError):
        while True:
            await device.call(0, bytes(8))


async def test_mistakes_of_a_device_stay_its_own(tmp_path: Path) -> None:
    """Issue 6: the device API is the same; so are the errors."""
    with Served(tmp_path, CONFIG) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            c0, c1 = await bridge.open("c0"), await bridge.open("c1")
            assert (await c0.call(0, bytes(8)))[1] == b"g1......"
            with pytest.raises(CallTimeoutError):
                await c0.call(1)
            counted = daemon.ask("stats", "device/c0")
            del counted["bus"]
            assert counted == {"cancelled": 1, "open": 1}
            with pytest.raises(VbusError) as bug:
                await c0.call(2)
            assert bug.value.errno == errno.EIO
            with pytest.raises(BusyError):
                await c0.call(3)
            await c0.call(4)  # its connection fails, and can be opened again
            await until_ended(c0)
            await c0.close()
            await c0.open()
            assert daemon.ask("stats", "devices/c0/open") == 1
            with suppress(NoDeviceError):  # it may be gone before the answer is seen
                await c0.call(5)
            with trio.fail_after(WITHIN_S):
                await c0.gone.wait()
            with pytest.raises(NoDeviceError):
                await c0.call(0, bytes(8))
            assert (await c1.call(0, bytes(8)))[1] == b"g1......"
        (shown,) = daemon.ask("backend", "show")
        assert (shown["state"], shown["starts"]) == ("up", 1)
