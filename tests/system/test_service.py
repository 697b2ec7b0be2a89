"""vbusd as a service: ready, alive, replaced, and its units as systemd reads them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from tests.system.manager import WITHIN_S, Manager

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "packaging" / "systemd"
CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
CONTROL, G1 = "vbus/control.sock", "vbus/guests/g1.sock"


def called(
    manager: Manager, data: bytes, guest: str = "g1", device: str = "echo0"
) -> bytes:
    """A call of a device by a guest process."""

    async def call() -> bytes:
        with trio.fail_after(WITHIN_S):
            async with attach(manager.guest(guest), memory_mib=4) as bridge:
                _, answer = await (await bridge.open(device)).call(0, data)
        return answer

    return trio.run(call)


# The life of a service


def test_it_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    """Type=notify: ready means that a guest can attach."""
    with Manager(tmp_path, CONFIG) as manager:
        manager.run()
        assert called(manager, b"hello") == b"hello"
        manager.wait_for("STATUS=0 of 1 guests attached, 1 devices.")
        assert manager.end(signal.SIGTERM) == 0
        while manager.take():
            pass
    assert manager.messages[-1].startswith("STOPPING=1")
    assert manager.messages.count("READY=1") == 1


def test_status_tells_of_guests(tmp_path: Path) -> None:
    with Manager(tmp_path, CONFIG) as manager:
        manager.run()

        async def main() -> None:
            async with attach(manager.guest(), memory_mib=4):
                await trio.to_thread.run_sync(manager.wait_for, "STATUS=1 of 1 guests")

        trio.run(main)
        manager.wait_for("STATUS=0 of 1 guests")


def test_a_start_that_fails_is_never_called_ready(tmp_path: Path) -> None:
    with Manager(tmp_path, "[[device]]\nname = 'd'\nclass = 'nonesuch'\n") as manager:
        assert manager.start().wait(WITHIN_S) == 78
        while manager.take():
            pass
        assert "READY=1" not in manager.messages


def test_the_watchdog_is_fed_until_it_hangs(tmp_path: Path) -> None:
    """R60: a stopped process is silent, a resumed one goes on."""
    with Manager(tmp_path, CONFIG, WATCHDOG_USEC="200000") as manager:
        manager.run()
        for _ in range(5):
            manager.wait_for("WATCHDOG=1")
        assert manager.process is not None
        manager.process.send_signal(signal.SIGSTOP)
        while manager.take():
            pass  # what it had sent before
        assert not any(manager.take() for _ in range(5)), "twice the watchdog's time"
        manager.process.send_signal(signal.SIGCONT)
        manager.wait_for("WATCHDOG=1")


def test_lines_for_the_journal_have_levels_and_nothing_else(tmp_path: Path) -> None:
    with Manager(tmp_path, CONFIG, JOURNAL_STREAM="of stderr") as manager:
        manager.run()
        assert manager.end(signal.SIGTERM) == 0
    lines = manager.log.read_text().splitlines()
    assert f"<6>vbus.daemon: ready in {manager.runtime}" in lines
    assert all(line.startswith("<6>vbus.") for line in lines)


# Sockets that outlive it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_connects_while_it_is_down_is_served_by_the_next(
    tmp_path: Path, number: signal.Signals
) -> None:
    """R60, R61: killed or restarted, guests and commands wait and are not refused."""
    with Manager(tmp_path, CONFIG) as manager:
        manager.run()
        manager.end(number)
        assert manager.stored_sockets == [CONTROL, G1]
        inode = manager.guest().stat().st_ino

        async def main() -> bytes:
            async with trio.open_nursery() as nursery:
                answers: list[bytes] = []

                async def guest() -> None:
                    found = await trio.to_thread.run_sync(called, manager, b"patience")
                    answers.append(found)

                async def command() -> None:
                    done = await trio.to_thread.run_sync(
                        manager.vbus, "guest", "show", "--json"
                    )
                    assert json.loads(done.stdout)[0]["name"] == "g1", done.stderr

                nursery.start_soon(guest)
                nursery.start_soon(command)
                await trio.to_thread.run_sync(_wait_for_client, manager.guest())
                await trio.to_thread.run_sync(manager.run)
            return answers[0]

        assert trio.run(main) == b"patience"
        assert manager.guest().stat().st_ino == inode
        assert manager.stored_sockets == [CONTROL, G1], "nothing is stored twice"


def _wait_for_client(path: Path) -> None:
    """Wait until a client waits in the backlog of `path`."""
    end = time.monotonic() + WITHIN_S
    while not _waiting(path):
        assert time.monotonic() < end
        time.sleep(0.01)


def _waiting(path: Path) -> int:
    lines = Path("/proc/net/unix").read_text().splitlines()
    found = [line.split() for line in lines if line.endswith(f" {path}")]
    return sum(fields[5] == "02" for fields in found)  # SS_CONNECTING: not accepted yet


def test_a_guest_added_live_is_kept_until_it_is_removed(tmp_path: Path) -> None:
    with Manager(tmp_path, CONFIG) as manager:
        manager.run()
        assert manager.vbus("guest", "add", "g2", "--bus", "bus0").returncode == 0
        manager.wait_for("FDNAME=vbus/guests/g2.sock")
        assert manager.vbus("guest", "del", "g2").returncode == 0
        manager.wait_for("FDSTOREREMOVE=1\nFDNAME=vbus/guests/g2.sock")
        assert not manager.guest("g2").exists()


def test_what_was_changed_live_is_there_again_after_a_sudden_end(
    tmp_path: Path,
) -> None:
    """R60: SIGKILL loses nothing of it; an ordered end goes back to the file."""
    with Manager(tmp_path, CONFIG) as manager:
        manager.run()
        assert manager.vbus("guest", "add", "g2", "--bus", "bus0").returncode == 0
        words = "device", "add", "echo1", "--class", "echo", "--bus", "bus0"
        done = manager.vbus(*words)
        assert done.returncode == 0, done.stderr
        for _ in range(2):
            manager.wait_for_state("echo1")
            manager.end(signal.SIGKILL)
            manager.run()
            assert called(manager, b"back", "g2", "echo1") == b"back"
        manager.end(signal.SIGTERM)
        manager.run()
        assert not manager.guest("g2").exists()
        assert manager.stored_sockets == [CONTROL, G1]


class Guest:
    """`vbus guest run --reconnect` as a process."""

    def __init__(self, manager: Manager, name: str, *more: str) -> None:
        words = ["guest", "run", str(manager.guest(name)), "--reconnect", "20", "-j"]
        words += more
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vbus", *words], stdout=subprocess.PIPE, text=True
        )

    def wait_for(self, key: str, value: str) -> None:
        """Read until an event is so."""
        assert self.process.stdout is not None
        limit = threading.Timer(WITHIN_S, self.process.kill)
        limit.start()
        try:
            for line in self.process.stdout:
                if json.loads(line).get(key) == value:
                    return
        finally:
            limit.cancel()
        raise AssertionError(f"the guest has ended, and was never {value}")

    def wait_for_work(self) -> None:
        """Read until it is attached, and a driver has opened and called its device."""
        self.wait_for("event", "attached")
        self.wait_for("state", "running")

    def end(self) -> int:
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=WITHIN_S)
        finally:
            self.process.kill()
            self.process.wait()
        return self.process.returncode


def test_four_guests_go_on_after_the_daemon_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R60: they attach to the next daemon by themselves, and their drivers run."""
    numbers = range(1, 5)
    config = "".join(
        f"[[bus]]\nname = 'bus{number}'\n"
        f"[[device]]\nname = 'e{number}'\nclass = 'echo'\nbus = 'bus{number}'\n"
        f"[[guest]]\nname = 'g{number}'\nbus = 'bus{number}'\n"
        for number in numbers
    )
    with Manager(tmp_path, config) as manager:
        manager.run()
        guests = [Guest(manager, f"g{number}") for number in numbers]
        try:
            for guest in guests:
                guest.wait_for_work()
            manager.wait_for("STATUS=4 of 4 guests attached")
            for _ in range(2):
                killed = time.monotonic()
                manager.end(signal.SIGKILL)
                manager.run()
                ready = time.monotonic()
                for guest in guests:
                    guest.wait_for_work()
                took = time.monotonic() - killed
                with capsys.disabled():
                    print(
                        f"\nready {ready - killed:.2f} s after the kill,"
                        f" four guests at work after {took:.2f} s"
                    )
                manager.wait_for("STATUS=4 of 4 guests attached")
        finally:
            statuses = [guest.end() for guest in guests]
        assert statuses == [0] * 4


# Socket activation


def test_a_command_starts_it_by_its_socket(tmp_path: Path) -> None:
    """`vbus tree` connects first; the daemon takes the socket as it is."""
    with Manager(tmp_path, CONFIG) as manager:
        control = manager.runtime / "control.sock"
        manager.listen(control, "control")
        inode = control.stat().st_ino
        manager.run()
        done = manager.vbus("guest", "show", "--json")
        assert json.loads(done.stdout)[0]["name"] == "g1", done.stderr
        assert manager.end(signal.SIGTERM) == 0
        assert control.stat().st_ino == inode, "it is its unit's"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(control))


def test_a_guests_socket_can_be_a_units(tmp_path: Path) -> None:
    with Manager(tmp_path, CONFIG) as manager:
        manager.listen(manager.guest(), "g1.socket")
        manager.run()
        assert called(manager, b"activated") == b"activated"
        assert manager.stored_sockets == [CONTROL]


# The units as files

analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd")


def analyzed(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run systemd-analyze. As root it leaves a mark in /run: so let it have its own."""
    hidden = 'mount -t tmpfs tmpfs /run && exec "$@"'
    before = [] if os.geteuid() else ["unshare", "--mount", "sh", "-c", hidden, "sh"]
    return subprocess.run(
        [*before, "systemd-analyze", *words], capture_output=True, text=True, timeout=60
    )


@analyze
@pytest.mark.parametrize(
    "name", ["vbusd.service", "vbusd.socket", "vbus-backend@x.service"]
)
def test_systemd_finds_nothing_wrong_in_a_unit(name: str, tmp_path: Path) -> None:
    """Verified as installed, in a root of its own; nothing is started."""
    folder = tmp_path / "usr" / "lib" / "systemd" / "system"
    shutil.copytree("/lib/systemd/system", folder, symlinks=True)
    for one in UNITS.iterdir():
        shutil.copy(one, folder)
    for where, command in ("usr/bin", "vbus"), ("bin", "kill"):
        program = tmp_path / where / command
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    done = analyzed(f"--root={tmp_path}", "verify", "--man=no", name)
    ours = [line for line in done.stderr.splitlines() if "vbus" in line]
    assert (done.returncode, ours) == (0, [])


@analyze
@pytest.mark.parametrize("name", ["vbusd.service", "vbus-backend@.service"])
def test_a_unit_is_sandboxed(name: str) -> None:
    """systemd's own exposure level, of 100: a service without any has 96."""
    options = ["security", "--offline=true", "--threshold=25"]
    done = analyzed(*options, str(UNITS / name))
    assert done.returncode == 0, done.stdout[-200:]
