"""Backends in processes of their own, under the daemon as a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from proxy.bridge import BridgeDriver
from proxy.drivers.echo import EchoDriver
from proxy.guest import attach
from proxy.registry import DriverHost, Report, State
from proxy.vfio_user import VfioUserClient
from tests.netns import isolated
from tests.system.served import WITHIN_S, Served
from vbus.errors import InvalidError, NotFoundError
from vbus.vfio_user import wire

BUS = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
FAR = """
[[backend]]
name = "far"
classes = ["echo"]
"""
ECHO = """
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
"""


async def call(daemon: Served, data: bytes, name: str = "echo0") -> bytes:
    async with attach(daemon.socket("g1")) as bridge:
        _, answer = await (await bridge.open(name)).call(0, data)
    return answer


def backend(daemon: Served, name: str = "far") -> "dict[str, object]":
    (shown,) = daemon.ask("backend", "show", name)
    assert isinstance(shown, dict)
    return shown


async def drive(bridge: BridgeDriver, nursery: trio.Nursery) -> EchoDriver:
    """Start the driver of the one echo device."""
    running = trio.Event()

    def note(report: Report) -> None:
        if report.state is State.RUNNING:
            running.set()

    host = DriverHost(bridge, report=note)
    nursery.start_soon(host.run)
    with trio.fail_after(WITHIN_S):
        await running.wait()
    (driver,) = host.drivers.values()
    assert isinstance(driver, EchoDriver)
    return driver


def test_a_device_in_a_process_of_its_own_answers_a_guest(tmp_path: Path) -> None:
    """R60: the class is the same, the process is not the daemon's."""
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        shown = backend(daemon)
        assert shown["state"] == "up"
        assert shown["pid"] != daemon.process.pid
        assert trio.run(call, daemon, b"far away") == b"far away"
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


async def test_messages_on_rings_never_pass_the_daemon(tmp_path: Path) -> None:
    """R60: the daemon asks the backend nothing while a guest's rings run."""
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        async with attach(daemon.socket("g1")) as bridge, trio.open_nursery() as tasks:
            driver = await drive(bridge, tasks)
            before = daemon.ask("stats", "backends/far")
            began = time.monotonic()
            for number in range(2000):
                message = number.to_bytes(4, "little") * 100
                assert await driver.exchange(message) == message
            lasted = time.monotonic() - began
            after = daemon.ask("stats", "backends/far")
            pings = 10 + 4 * lasted  # those of the health check, two a second
            assert after["requests"] - before["requests"] <= pings
            assert (after["guests"], after["connections"]) == (1, 1)
            tasks.cancel_scope.cancel()
        left = daemon.ask("stats", "backends/far")
        assert (left["guests"], left["connections"]) == (0, 0)


@pytest.mark.parametrize(("flags", "size"), [(wire.UnmapFlag.ALL, 0), (0, 1 << 62)])
async def test_what_the_guest_unmaps_is_gone_before_it_is_answered(
    tmp_path: Path, flags: int, size: int
) -> None:
    """R51: no mapping of the range is left in the backend, nor in the daemon."""
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        pid = backend(daemon)["pid"]
        async with attach(daemon.socket("g1")) as bridge:
            echo = await bridge.open("echo0")
            await echo.ring(0, 8)
            assert guest_memory(pid)
            await unmap(bridge, wire.DmaUnmap(flags, 0, size))
            assert not guest_memory(pid)
            assert daemon.mappings == 0


def guest_memory(pid: object) -> list[str]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in maps if "memfd:" in line]


async def unmap(bridge: BridgeDriver, request: wire.DmaUnmap) -> None:
    client = bridge.function
    assert isinstance(client, VfioUserClient)
    await client._request(wire.Command.DMA_UNMAP, request.pack())


def test_devices_are_added_changed_counted_and_removed(tmp_path: Path) -> None:
    config = BUS + '[[backend]]\nname = "net"\nclasses = ["switch", "venet"]\n'
    with Served(tmp_path, config) as daemon:
        daemon.ask("device", "add", "lan0", "--class", "switch", "mac_limit=7")
        words = ("device", "add", "p0", "--class", "venet", "--bus", "bus0")
        added = daemon.ask(*words, "switch=lan0")
        assert added["links"] == [{"bus": "bus0", "id": 0}]
        assert added["type"] == "virtual-ethernet"
        assert added["attributes"]["mtu"] == 1500
        refused = daemon.vbus(*words[:2], "p1", *words[3:], "switch=nonesuch")
        assert "nonesuch" in refused.stderr
        assert daemon.vbus("device", "show", "p1").returncode == 1
        changed = daemon.ask("device", "set", "lan0", "mac_limit=16")
        assert changed["attributes"]["mac_limit"] == 16
        wrong = daemon.vbus("device", "set", "lan0", "mac_limit=-1")
        assert "mac_limit" in wrong.stderr
        assert daemon.ask("stats", "devices/lan0/ports") == 1
        used = daemon.vbus("device", "del", "lan0")
        assert "used by p0" in used.stderr
        daemon.ask("device", "del", "p0")
        assert daemon.ask("stats", "devices/lan0/ports") == 0
        daemon.ask("device", "del", "lan0")
        assert backend(daemon, "net")["devices"] == {}


def test_a_restart_gives_a_new_process_the_same_devices(tmp_path: Path) -> None:
    """What was set, linked and unlinked meanwhile is kept."""
    config = BUS + '[[backend]]\nname = "net"\nclasses = ["switch", "venet"]\n'
    with Served(tmp_path, config) as daemon:
        daemon.ask("device", "add", "lan0", "--class", "switch")
        words = ("device", "add", "p0", "--class", "venet", "--bus", "bus0")
        daemon.ask(*words, "switch=lan0")
        daemon.ask("device", "set", "lan0", "mac_limit=99")
        daemon.ask("bus", "add", "bus1")
        daemon.ask("device", "link", "bus1", "p0")
        daemon.ask("device", "unlink", "bus0", "p0")
        before = backend(daemon, "net")["pid"]
        assert daemon.ask("device", "restart", "p0")["restarted"] == ["lan0", "p0"]
        assert backend(daemon, "net")["pid"] != before
        lan0, p0 = daemon.ask("device", "show")
        assert lan0["attributes"]["mac_limit"] == 99
        assert [link["bus"] for link in p0["links"]] == ["bus1"]


def test_a_device_of_the_daemon_is_restarted_in_place(tmp_path: Path) -> None:
    with Served(tmp_path, BUS + ECHO) as daemon:
        assert daemon.ask("device", "restart", "echo0")["restarted"] == ["echo0"]
        (shown,) = daemon.ask("device", "show", "echo0")
        assert shown["links"] == [{"bus": "bus0", "id": 1}]
        assert trio.run(call, daemon, b"anew") == b"anew"


def start_dice(daemon: Served, *words: str) -> "subprocess.Popen[bytes]":
    with daemon.log.open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "vbus", "backend", "run"),
                *("examples.dice:Dice", "--name", "casino", *words),
            ],
            env=daemon.environment,
            stderr=log,
        )


def wait_for_state(daemon: Served, name: str, state: str) -> None:
    end = time.monotonic() + WITHIN_S
    while not any(
        one["name"] == name and one["state"] == state
        for one in daemon.ask("backend", "show")
    ):
        assert time.monotonic() < end, daemon.log.read_text()


def test_the_example_device_runs_unchanged_in_a_backend_that_comes_by_itself(
    tmp_path: Path,
) -> None:
    """R60: `vbus backend run MODULE:CLASS` brings its device, and takes it along."""
    with Served(tmp_path, BUS) as daemon:
        dice = start_dice(daemon, "--device", "d0", "--bus", "bus0", "--set", "sides=2")
        try:
            wait_for_state(daemon, "casino", "up")
            assert set(trio.run(call, daemon, bytes(64), "d0")) <= {1, 2}
            daemon.ask("device", "add", "d1", "--class", "dice", "--bus", "bus0")
            assert max(trio.run(call, daemon, bytes(200), "d1")) > 2
            dice.send_signal(signal.SIGTERM)
            assert dice.wait(WITHIN_S) == 0
            wait_for_state(daemon, "casino", "down")
            assert daemon.ask("device", "show") == []
        finally:
            dice.kill()
            dice.wait()
        with pytest.RaisesGroup(
            NotFoundError, flatten_subgroups=True, allow_unwrapped=True
        ):
            trio.run(call, daemon, bytes(1), "d0")
        again = start_dice(daemon)
        try:
            wait_for_state(daemon, "casino", "up")
            assert [one["name"] for one in daemon.ask("device", "show")] == ["d1"]
        finally:
            again.terminate()
            again.wait()


def test_a_second_process_of_one_name_is_refused(tmp_path: Path) -> None:
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        first = start_dice(daemon)
        try:
            wait_for_state(daemon, "casino", "up")
            assert start_dice(daemon).wait(WITHIN_S) != 0
            assert start_dice(daemon, "--name", "far").wait(WITHIN_S) != 0
            assert "has a process already" in daemon.log.read_text()
            assert "is started by the daemon itself" in daemon.log.read_text()
            assert backend(daemon, "casino")["pid"] == first.pid
            assert trio.run(call, daemon, b"still here") == b"still here"
        finally:
            first.terminate()
            assert first.wait(WITHIN_S) == 0


def test_backends_end_with_the_daemon_however_it_ends(tmp_path: Path) -> None:
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        pid = backend(daemon)["pid"]
        assert isinstance(pid, int)
        waiting = os.pidfd_open(pid)
        try:
            daemon.process.kill()
            daemon.process.wait()
            assert trio.run(gone, waiting)
        finally:
            os.close(waiting)


async def gone(pidfd: int) -> bool:
    with trio.move_on_after(WITHIN_S):
        await trio.lowlevel.wait_readable(pidfd)
        return True
    return False


def test_what_a_backend_refuses_is_the_guests_errno(tmp_path: Path) -> None:
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:

        async def refused() -> None:
            async with attach(daemon.socket("g1")) as bridge:
                echo = await bridge.open("echo0")
                with pytest.raises(InvalidError):
                    await echo.call(77, b"no such function")
                with pytest.raises(InvalidError):
                    await echo.ring(9, 8)
                assert (await echo.call(0, b"lives"))[1] == b"lives"

        trio.run(refused)


NET = """
[[backend]]
name = "net"
classes = ["switch", "venet"]
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "p0"
class = "venet"
bus = "bus0"
switch = "lan0"
"""


@isolated
async def test_venet_and_its_switch_run_unchanged_in_a_backend(tmp_path: Path) -> None:
    """R60: the guest's interface sends; the switch in the other process counts."""
    with Served(tmp_path, BUS + NET) as daemon:
        async with attach(daemon.socket("g1")) as bridge, trio.open_nursery() as tasks:
            running = trio.Event()

            def note(report: Report) -> None:
                if report.state is State.RUNNING:
                    running.set()

            host = DriverHost(bridge, report=note, defaults={"virtual-ethernet": {}})
            tasks.start_soon(host.run)
            with trio.fail_after(WITHIN_S):
                await running.wait()
            # IPv6 announces itself on an interface that comes up.
            await trio.run_process(["ip", "link", "set", "p0", "up"])
            with trio.fail_after(WITHIN_S):
                while not (await sent(daemon))["tx_frames"]:
                    pass
            tasks.cancel_scope.cancel()


async def sent(daemon: Served) -> "dict[str, int]":
    counted = await trio.to_thread.run_sync(daemon.ask, "stats", "devices/p0")
    assert isinstance(counted, dict)
    return counted
