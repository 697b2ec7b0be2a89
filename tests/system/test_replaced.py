"""SIGUSR2: the daemon executes itself anew under its guests, which need not know."""

import os
import re
import signal
import socket
import statistics as stats
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from proxy.bridge import BridgeDriver
from proxy.drivers.echo import EchoDriver
from proxy.guest import attach
from tests.netns import isolated
from tests.proxy.virtio.guests import disk_on
from tests.system.manager import Manager
from tests.system.served import WITHIN_S, Served
from tests.system.test_backends import drive
from tests.system.test_hostile import settled
from tests.system.test_transparent_disk import Writers

REPLACEMENTS = 2
BUS = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
ECHO = """
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
"""
DISK = """
[[device]]
name = "disk0"
class = "virtio-blk"
bus = "bus0"
path = "PATH"
size = "16M"
"""
TAP = """
[[device]]
name = "lan"
class = "switch"
[[device]]
name = "up"
class = "switch-tap"
switch = "lan"
ifname = "tap6"
"""
CONSOLE = """
[[device]]
name = "console0"
class = "virtio-console"
"""


def lives(served: Served) -> int:
    return served.log.read_bytes().count(b"ready in")


async def replaced(served: Served) -> float:
    """Have it replaced; the seconds until it is ready again."""
    before, began = lives(served), time.monotonic()
    served.process.send_signal(signal.SIGUSR2)
    await trio.to_thread.run_sync(until_ready, served, before)
    return time.monotonic() - began


def until_ready(served: Served, before: int) -> None:
    end = time.monotonic() + WITHIN_S
    while lives(served) == before:
        assert served.process.poll() is None, served.log.read_text()
        assert time.monotonic() < end, served.log.read_text()
        time.sleep(0.005)


def until_logged(served: Served, text: str) -> None:
    end = time.monotonic() + WITHIN_S
    while text not in served.log.read_text():
        assert served.process.poll() is None, served.log.read_text()
        assert time.monotonic() < end, served.log.read_text()
        time.sleep(0.005)


@asynccontextmanager
async def driven(served: Served) -> AsyncIterator[tuple[BridgeDriver, EchoDriver]]:
    """A guest that has its echo device's driver running."""
    async with (
        attach(served.socket("g1"), memory_mib=8) as bridge,
        trio.open_nursery() as nursery,
    ):
        yield bridge, await drive(bridge, nursery)
        nursery.cancel_scope.cancel()


async def test_a_guest_calls_and_moves_messages_and_is_told_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R60: handles and rings live on; whatever it was doing just takes longer."""
    with Served(tmp_path, BUS + ECHO) as served:
        pid = served.process.pid
        fds, mappings = served.fds, served.mappings
        took: list[float] = []
        async with driven(served) as (bridge, echo):
            told = bridge.statistics().events
            done = trio.Event()

            async def exchange() -> None:
                number = 0
                while not done.is_set():
                    message = number.to_bytes(8, "little") * 100
                    assert await echo.exchange(message) == message
                    assert (await echo.device.call(0, message))[1] == message
                    number += 1
                assert number > REPLACEMENTS

            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange)
                for _ in range(REPLACEMENTS):
                    took.append(await replaced(served))
                done.set()
            now = bridge.statistics().events
            for kind in ("devadd", "devdrop", "shmclose"):
                assert now.get(kind, 0) == told.get(kind, 0), kind
            (guest,) = served.ask("guest", "show", "g1")
            assert guest["connections"] == ["echo0"]
        with capsys.disabled():
            print(f"\nsignal to ready: {stats.median(took):.2f} s")
        assert served.process.pid == pid
        now_fds, now_mappings = settled(served)
        assert now_fds <= fds
        assert now_mappings == mappings
        async with driven(served) as (_, echo):
            assert await echo.exchange(b"once more") == b"once more"


async def test_a_disk_goes_on_with_what_was_under_way(tmp_path: Path) -> None:
    """R60: of a virtio device in the daemon, what it took and did not give back too."""
    config = BUS + DISK.replace("PATH", str(tmp_path / "image"))
    with Served(tmp_path, config) as served:
        async with attach(served.socket("g1")) as bridge, disk_on(bridge) as disk:
            writers = Writers(disk)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writers.run)
                await writers.go_on()
                for _ in range(REPLACEMENTS):
                    await replaced(served)
                    await writers.go_on()
                writers.stop()
            await writers.check_all()
            assert not bridge.statistics().events.get("devdrop")


@isolated
async def test_a_tap_stays_as_others_changed_it(tmp_path: Path) -> None:
    """R60: the very interface, not another of its name."""
    with Served(tmp_path, TAP) as served:
        before = interface()
        for _ in range(2):
            await replaced(served)
            assert interface() == before


def interface() -> int:
    """The interface's index, which the kernel gives no second time."""
    return socket.if_nametoindex("tap6")


async def test_a_device_that_cannot_go_on_is_plugged_in_anew(tmp_path: Path) -> None:
    """R60: the guest is told, by an id that it has not seen; the others go on."""
    with Served(tmp_path, BUS + ECHO + CONSOLE + 'bus = "bus0"\n') as served:
        async with driven(served) as (bridge, echo):
            before = (await bridge.device("console0")).id
            kept = (await bridge.device("echo0")).id
            await replaced(served)
            with trio.fail_after(WITHIN_S):
                while (await bridge.device("console0")).id == before:
                    await trio.lowlevel.checkpoint()
            assert before not in bridge.devices
            assert (await bridge.device("console0")).id > max(before, kept)
            assert (await bridge.device("echo0")).id == kept
            assert await echo.exchange(b"on") == b"on"


async def test_backends_are_started_anew(tmp_path: Path) -> None:
    """R60: their processes have ended before their guests hear of it."""
    config = BUS + ECHO + '[[backend]]\nname = "far"\nclasses = ["echo"]\n'
    with Served(tmp_path, config) as served:
        async with attach(served.socket("g1"), memory_mib=4) as bridge:
            before = await bridge.open("echo0")
            assert (await before.call(0, b"far"))[1] == b"far"
            (old,) = served.ask("backend", "show", "far")
            await replaced(served)
            with trio.fail_after(WITHIN_S):
                while (after := await bridge.device("echo0")).id == before.id:
                    await trio.lowlevel.checkpoint()
            again = await bridge.open("echo0")
            assert again is after
            assert (await again.call(0, b"anew"))[1] == b"anew"
            (new,) = served.ask("backend", "show", "far")
            assert new["pid"] != old["pid"]
            with pytest.raises(ProcessLookupError):
                os.kill(old["pid"], 0)


async def test_what_does_not_start_replaces_nothing(tmp_path: Path) -> None:
    """An upgrade gone wrong: the guest is still served, by the one who runs."""
    modules = tmp_path / "modules"
    modules.mkdir()
    with Served(tmp_path, BUS + ECHO, modules=modules) as served:
        async with driven(served) as (_, echo):
            broken = modules / "sitecustomize.py"
            broken.write_text("raise SystemExit(1)\n")
            served.process.send_signal(signal.SIGUSR2)
            await trio.to_thread.run_sync(until_logged, served, "does not start")
            assert await echo.exchange(b"still") == b"still"
            broken.unlink()
            await replaced(served)
            assert await echo.exchange(b"and now") == b"and now"


async def test_nothing_is_replaced_under_a_function_that_cannot_wait(
    tmp_path: Path,
) -> None:
    """A QEMU that has a virtio-pci function would lose it for good."""
    with Served(tmp_path, BUS + ECHO + CONSOLE + 'expose = "pci"\n') as served:
        socket = served.runtime / "functions" / "console0.sock"
        with trio.socket.socket(trio.socket.AF_UNIX) as client:
            await client.connect(str(socket))
            await trio.to_thread.run_sync(until_logged, served, "client connected")
            served.process.send_signal(signal.SIGUSR2)
            await trio.to_thread.run_sync(until_logged, served, "console0 has a guest")
        assert lives(served) == 1
        await trio.to_thread.run_sync(until_logged, served, "console0: client left")
        await replaced(served)


def test_under_a_manager_it_is_the_same_service(tmp_path: Path) -> None:
    """R60: RELOADING, then READY by the same process; what is stored stays so."""
    with Manager(tmp_path, BUS + ECHO, WATCHDOG_USEC="200000") as manager:
        manager.run()
        manager.wait_for("FDNAME=vbus/state.")
        sockets = manager.stored_sockets
        assert manager.process is not None
        for _ in range(2):
            manager.process.send_signal(signal.SIGUSR2)
            manager.wait_for("RELOADING=1")
            assert re.search(r"MONOTONIC_USEC=\d+", manager.messages[-1])
            manager.wait_for("READY=1")
            manager.wait_for("FDSTOREREMOVE=1\nFDNAME=vbus/state.")
            manager.wait_for("WATCHDOG=1")
        assert manager.stored_sockets == sockets
        assert len(manager.states) == 1
        assert manager.end(signal.SIGTERM) == 0


def test_a_state_that_makes_no_sense_is_as_good_as_none(tmp_path: Path) -> None:
    """Garbage, or what an older version left: one line, and a clean start."""
    with Manager(tmp_path, BUS + ECHO) as manager:
        for number, data in enumerate([b"\xc1", b"\x81\xa7version\x63"], 1):
            manager.store.append((f"vbus/state.{number}", manager.memfd(data)))
            manager.run()
            manager.wait_for("FDSTOREREMOVE=1")
            assert manager.log.read_text().count("starting anew") == number
            assert manager.guest().is_socket()
            manager.end(signal.SIGKILL)
            for name in [name for name, _ in manager.store if "state" in name]:
                manager.forget(name)
