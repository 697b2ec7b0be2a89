"""`vbus compare --measure` on real machines: one round in each way, few devices."""

import os

import pytest
import trio

from vbus.compare import machines, words
from vbus.compare.measure import ROUND_S
from vbus.vm import qemu
from vbus.vm.image import GuestImage

COUNT = 3
VECTORS = {"vbus-bridge": 8, "function-each": 3 * COUNT}
ONLY_PROCESSES = {"attach", "open_call_close", "call"}
ONLY_BRIDGE = {"urgent_first", "urgent_first_high"}


@pytest.mark.parametrize("way", list(machines.WAYS))
async def test_a_round_measures_everything_on_a_machine(
    emulator: qemu.Qemu, image: GuestImage, way: str
) -> None:
    """R10, R40, R41, R62: the same three cards behind one function and as three, with
    traffic, a flood and hot plug; counted by the server and in /proc/interrupts."""
    why = machines.unavailable()
    if why and not os.environ.get("VBUS_VM_REQUIRED"):
        pytest.skip(why)
    with trio.fail_after(ROUND_S):
        found = await machines.one_round(way, COUNT, True)
    bridge = way == "vbus-bridge"
    missing = ONLY_PROCESSES if bridge else ONLY_PROCESSES | ONLY_BRIDGE
    assert set(found.values) == set(words.MEASURES) - missing
    values = found.values
    print(way, values, found.loads)
    assert values["functions"] == (1 if bridge else COUNT)
    assert values["vectors"] == VECTORS[way]
    assert values["shared_lines"] == 0
    assert 0 < values["boot"] <= values["bring_up"]
    # Each function is asked more than a hundred times until Linux has done with it.
    assert values["config_accesses"] > 100 * values["functions"]
    assert values["tcp_out"] > 1e6
    assert values["tcp_in"] > 1e6
    assert set(found.loads) == {1, 2, 4, 8}
    for one in found.loads.values():
        assert one["interrupts_per_1000"] > 0
        assert one["messages_per_s"] > 0
    assert values["hot_add"] > 0
    assert values["hot_remove"] > 0
