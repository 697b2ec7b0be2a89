"""Transparent devices: their process ends, and the guest notices nothing."""

import itertools
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.device import DeviceProxy, SharedMemory
from proxy.guest import attach
from tests.system.served import WITHIN_S, Served
from tests.system.test_backend_faults import Watcher
from tests.system.test_backends import BUS
from tests.system.test_hostile import settled
from vbus.control.client import ControlClient
from vbus.errors import CallTimeoutError, NoDeviceError, VbusError

KILLS = int(os.environ.get("VBUS_TEST_TRANSPARENT_KILLS", "2"))
"""How often a process is killed in each test that kills at random moments."""
PAUSE_S = float(os.environ.get("VBUS_TEST_TRANSPARENT_PAUSE_S", "0"))
"""Least time between kills: more than 2, and none counts as one of a row."""

TALLY = f"""
[[backend]]
name = "far"
classes = ["tally"]
deadline_s = DEADLINE
restart_limit = LIMIT
command = [
    "{sys.executable}", "-m", "vbus", "backend", "run",
    "--name", "far", "tests.system.tally:Tally",
]
[[device]]
name = "t0"
class = "tally"
bus = "bus0"
"""
OTHER = '[[guest]]\nname = "g2"\nbus = "bus0"\n'
CONFIG = BUS + OTHER + TALLY.replace("LIMIT", "1000").replace("DEADLINE", "30")


async def total(device: DeviceProxy, function: int = 0) -> int:
    _, answer = await device.call(function, bytes(8))
    (count,) = struct.unpack("<Q", answer)
    assert isinstance(count, int)
    return count


async def ask(daemon: Served, operation: str, **arguments: object) -> Any:
    """Ask the daemon, without a process for it."""
    async with ControlClient(daemon.runtime / "control.sock") as control:
        return await control.request(operation, **arguments)


async def shown(daemon: Served, name: str = "far") -> dict[str, Any]:
    (found,) = await ask(daemon, "backend.show", name=name)
    assert isinstance(found, dict)
    return found


async def kill(daemon: Served, name: str = "far", number: int = signal.SIGKILL) -> int:
    """Signal the process that works now; gives its id."""
    pid = (await shown(daemon, name))["pid"]
    assert isinstance(pid, int)
    os.kill(pid, number)
    return pid


async def other_process(daemon: Served, pid: int, name: str = "far") -> None:
    """Wait until another process than `pid` works."""
    with trio.fail_after(WITHIN_S):
        while True:
            found = await shown(daemon, name)
            if found["state"] == "up" and found["pid"] != pid:
                return


async def until_closed(shm: SharedMemory) -> None:
    """Wait for the SHMCLOSE of a memory, whatever is signalled before."""
    with trio.fail_after(WITHIN_S):
        while True:
            try:
                await shm.wake.wait()
            except VbusError:
                return


async def test_calls_are_answered_once_each_while_the_process_is_killed(
    tmp_path: Path,
) -> None:
    """Issue 6: calls under way are held, none is lost, none runs twice."""
    choice = random.Random(1)
    with Served(tmp_path, CONFIG) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            watcher = Watcher()
            with bridge.observed(watcher):
                await watcher.until(("added", "t0"))
                device = await bridge.open("t0")
                gaps = [0.0]
                async with trio.open_nursery() as nursery:

                    async def count() -> None:
                        last = time.monotonic()
                        for expected in itertools.count(1):
                            assert await total(device, expected % 2) == expected
                            now = time.monotonic()
                            gaps.append(now - last)
                            last = now

                    nursery.start_soon(count)
                    for _ in range(KILLS):
                        await trio.sleep(PAUSE_S + choice.random() / 5)
                        await other_process(daemon, await kill(daemon))
                    nursery.cancel_scope.cancel()
                assert watcher.seen == [("added", "t0")]
            assert len(gaps) > 2 * KILLS
            print(f"longest call {max(gaps):.3f} s")
        assert (await shown(daemon))["starts"] == KILLS + 1


async def test_a_hung_process_is_replaced_and_the_call_goes_to_the_next(
    tmp_path: Path,
) -> None:
    """Issue 6: SIGSTOP; it misses its deadline, and the guest's call is answered."""
    config = CONFIG.replace("deadline_s = 30", "deadline_s = 1")
    with Served(tmp_path, config) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            device = await bridge.open("t0")
            assert await total(device) == 1
            await kill(daemon, number=signal.SIGSTOP)
            with trio.fail_after(WITHIN_S):
                assert await total(device) == 2
        assert "no answer to ping" in daemon.log.read_text()


async def test_a_call_that_kills_each_process_ends_with_the_guests_patience(
    tmp_path: Path,
) -> None:
    """Issue 6: held within the guest's call timeout, then ETIMEDOUT."""
    config = CONFIG.replace('name = "g1"\n', 'name = "g1"\ncall_timeout_s = 1.5\n')
    config = config.replace("deadline_s = 30", "deadline_s = 1")
    with Served(tmp_path, config) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            device = await bridge.open("t0")
            with pytest.raises(CallTimeoutError), trio.fail_after(WITHIN_S):
                await device.call(2)
            with trio.fail_after(WITHIN_S):
                while True:
                    try:
                        assert await total(device) == 1
                        break
                    except CallTimeoutError:
                        pass


async def test_a_restart_hands_over_to_a_process_that_is_there_already(
    tmp_path: Path,
) -> None:
    """R8: `vbus device restart`, as for an upgrade, under calls."""
    with Served(tmp_path, CONFIG) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            device = await bridge.open("t0")
            async with trio.open_nursery() as nursery:

                async def count() -> None:
                    for expected in itertools.count(1):
                        assert await total(device) == expected

                nursery.start_soon(count)
                for _ in range(2):
                    before = (await shown(daemon))["pid"]
                    done = await ask(daemon, "device.restart", name="t0")
                    assert done == {"restarted": ["t0"]}
                    assert (await shown(daemon))["pid"] != before
                nursery.cancel_scope.cancel()


async def test_memory_and_connections_go_along_and_nothing_leaks(
    tmp_path: Path,
) -> None:
    """Issue 6: what is closed, shared or opened meanwhile is not mixed up."""
    with Served(tmp_path, CONFIG) as daemon:
        before = settled(daemon)
        async with (
            attach(daemon.socket("g1")) as bridge,
            attach(daemon.socket("g2")) as other,
        ):
            first, second = await bridge.open("t0"), await other.open("t0")
            await first.ring(0, 8)
            assert [await total(first), await total(first)] == [1, 2]
            pid = await kill(daemon)
            await second.close()
            third = await other.open("t0")
            await first.ring(1, 8)
            await other_process(daemon, pid)
            assert await total(third) == 1
            assert await total(first) == 3
            counted = daemon.ask("stats", "backends/far")
            assert (counted["guests"], counted["connections"]) == (2, 2)
        assert settled(daemon) == before
        assert "Traceback" not in daemon.log.read_text()


async def until_gone(device: DeviceProxy) -> None:
    with trio.fail_after(WITHIN_S):
        while True:
            try:
                await total(device)
            except VbusError:
                return


async def test_a_device_that_is_given_up_leaves_the_bus(tmp_path: Path) -> None:
    """Issue 6: after restart_limit the ordinary SHMCLOSE and DEVDROP."""
    flag = tmp_path / "broken"
    run = f"{sys.executable} -m vbus backend run --name far tests.system.tally:Tally"
    script = f'command = ["/bin/sh", "-c", "test -e {flag} && exit 3; exec {run}"]\n'
    head, _, tail = (
        TALLY.replace("LIMIT", "2").replace("DEADLINE", "30").partition("command = [")
    )
    config = BUS + head + script + tail.partition("]\n")[2]
    with Served(tmp_path, config) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            watcher = Watcher()
            with bridge.observed(watcher):
                await watcher.until(("added", "t0"))
                device = await bridge.open("t0")
                _, shm = await device.ring(0, 8)
                flag.touch()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(until_gone, device)
                    await other_process(daemon, await kill(daemon))  # the standby
                    await kill(daemon)
                    await until_closed(shm)
                    await watcher.until(("dropped", "t0"))
                with pytest.raises(NoDeviceError):
                    await total(device)
                assert (await shown(daemon))["state"] == "failed"
                flag.unlink()
                done = await ask(daemon, "backend.restart", name="far")
                assert done["state"] == "up"
                await watcher.until(("added", "t0"))
                again = await bridge.open("t0")
                assert await total(again) == 1


async def test_a_record_that_lies_ends_its_own_connection_alone(tmp_path: Path) -> None:
    """Issue 6: the next process and the daemon go on, and so do the others."""
    with Served(tmp_path, CONFIG) as daemon:
        async with (
            attach(daemon.socket("g1")) as bridge,
            attach(daemon.socket("g2")) as good,
        ):
            liar, other = await bridge.open("t0"), await good.open("t0")
            assert await total(other) == 1
            _, shm = await liar.ring(0, 8)
            await liar.call(3)
            await kill(daemon)
            await until_closed(shm)
            await until_gone(liar)
            assert await total(other) == 2
            await liar.close()
            await liar.open()
            assert await total(liar) == 1
        assert (await shown(daemon))["starts"] == 2
