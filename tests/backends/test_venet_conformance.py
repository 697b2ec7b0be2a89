"""Every class behind "virtual-ethernet", and echo, keeps the rules of the bus."""

import pytest

from backends.echo import Echo
from backends.venet import Switch, Venet, VenetLoopback
from vbus.bus import BusModel
from vbus.device import Device
from vbus.testing import check_device


def _venet_on_a_switch(model: BusModel) -> Device:
    model.classes.update(switch=Switch, venet=Venet)
    model.add_device("lan0", "switch", {})
    return model.add_device("port0", "venet", {"switch": "lan0"})


async def test_a_port_of_a_switch_conforms() -> None:
    """R15, R2: with all garbage calls, memory and rings of the kit."""
    await check_device(_venet_on_a_switch)


@pytest.mark.parametrize("offload", [False, True])
async def test_the_loopback_conforms(offload: bool) -> None:
    """R2: another class behind the same type string."""
    await check_device(VenetLoopback, offload=offload)


async def test_echo_conforms() -> None:
    """R4, R5."""
    await check_device(Echo)
