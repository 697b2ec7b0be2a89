"""`vbus compare --measure` on real machines: one round in each way, few devices."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from vbus.compare import machines, words
from vbus.compare.measure import ROUND_S
from vbus.vm import qemu
from vbus.vm.image import GuestImage

COUNT = 3
WITHIN_S = 60
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


def below(pid: int) -> dict[int, bytes]:
    """Processes that one has started, at any depth, with their commands."""
    found: dict[int, bytes] = {}
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                found |= {child: command, **below(child)}
    return found


def runs(pid: int) -> bool:
    """Tell whether a process is there and has not ended."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_ctrl_c_leaves_no_machine_behind(
    emulator: qemu.Qemu, image: GuestImage
) -> None:
    """In the middle of a boot: a report, exit status 130, no QEMU and no daemon."""
    if why := machines.unavailable():
        pytest.skip(why)
    words = ["--devices", "1", "--measure", "--guests", "vm", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vbus", "compare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    end = time.monotonic() + WITHIN_S
    there: dict[int, bytes] = {}
    try:
        while not any(b"vfio-user-pci" in command for command in there.values()):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
            there = below(process.pid)
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + WITHIN_S
        out, err = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert json.loads(out)["interrupted"]
    while left := {pid: command for pid, command in there.items() if runs(pid)}:
        assert time.monotonic() < end, left
        time.sleep(0.02)
