"""Backends that die, hang and lie: it is an event for their own devices, no other's."""

import itertools
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from proxy.device import DeviceProxy
from proxy.drivers.echo import EchoDriver
from proxy.guest import attach
from proxy.registry import DriverHost
from tests.system.liar import LIES
from tests.system.served import WITHIN_S, Served
from tests.system.test_backends import (
    BUS,
    ECHO,
    FAR,
    backend,
    call,
    guest_memory,
    unmap,
)
from tests.system.test_hostile import settled
from vbus.control.client import ControlClient
from vbus.errors import CallTimeoutError, NoDeviceError, VbusError
from vbus.vfio_user import wire

KILLS = int(os.environ.get("VBUS_KILLS", "12"))
"""How often a random backend is killed under traffic."""

QUICK = FAR + "deadline_s = 1.5\n"


class Watcher:
    """Sees devices come and go as the guest does."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self._changed = trio.Event()

    def added(self, device: DeviceProxy) -> None:
        self._note("added", device)

    def dropped(self, device: DeviceProxy) -> None:
        self._note("dropped", device)

    def _note(self, what: str, device: DeviceProxy) -> None:
        self.seen.append((what, device.name))
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, *wanted: tuple[str, str]) -> None:
        with trio.fail_after(WITHIN_S):
            while tuple(self.seen[-len(wanted) :]) != wanted:
                await self._changed.wait()


def pid_of(daemon: Served, name: str = "far") -> int:
    pid = backend(daemon, name)["pid"]
    assert isinstance(pid, int)
    return pid


async def test_a_killed_backend_leaves_the_bus_and_comes_back(tmp_path: Path) -> None:
    """Issue 6: SHMCLOSE and DEVDROP reach the guest, and after the restart DEVADD."""
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            watcher = Watcher()
            with bridge.observed(watcher):
                await watcher.until(("added", "echo0"))
                echo = await bridge.open("echo0")
                _, shm = await echo.ring(0, 8)
                os.kill(pid_of(daemon), signal.SIGKILL)
                with pytest.raises(VbusError), trio.fail_after(WITHIN_S):
                    await shm.wake.wait()  # its SHMCLOSE
                await watcher.until(("dropped", "echo0"), ("added", "echo0"))
                with pytest.raises(NoDeviceError):
                    await echo.call(0, b"gone")
                again = await bridge.open("echo0")
                assert (await again.call(0, b"again"))[1] == b"again"
        assert backend(daemon)["starts"] == 2


async def test_calls_to_a_stopped_backend_time_out_and_nobody_else_waits(
    tmp_path: Path,
) -> None:
    """Issue 6: noticed within its deadline; ETIMEDOUT; others' calls are answered."""
    config = BUS + QUICK + ECHO + OTHER
    with Served(tmp_path, config) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            echo, other = await bridge.open("echo0"), await bridge.open("other0")
            os.kill(pid_of(daemon), signal.SIGSTOP)
            answered = 0
            async with trio.open_nursery() as nursery:

                async def others() -> None:
                    nonlocal answered
                    while True:
                        await other.call(0, b"me")
                        answered += 1

                nursery.start_soon(others)
                with pytest.raises(CallTimeoutError), trio.fail_after(WITHIN_S):
                    await echo.call(0, b"hello")
                nursery.cancel_scope.cancel()
            assert answered > 10
            watcher = Watcher()
            with bridge.observed(watcher), trio.fail_after(WITHIN_S):
                while ("added", "echo0") not in watcher.seen:
                    await watcher.until(watcher.seen[-1])
                    await trio.sleep(0.01)
        assert "no answer to ping" in daemon.log.read_text()


OTHER = """
[[backend]]
name = "other"
classes = ["echo"]
[[device]]
name = "other0"
class = "echo"
backend = "other"
bus = "bus0"
"""


@pytest.mark.parametrize("how", ["unmap", "reset"])
async def test_a_stopped_backend_cannot_keep_what_a_guest_takes_back(
    tmp_path: Path, how: str
) -> None:
    """Issue 6, R51: it is killed, and only then the guest gets its answer."""
    with Served(tmp_path, BUS + QUICK + ECHO) as daemon:
        async with attach(daemon.socket("g1")) as bridge:
            echo = await bridge.open("echo0")
            await echo.ring(0, 8)
            pid = pid_of(daemon)
            pidfd = os.pidfd_open(pid)
            try:
                os.kill(pid, signal.SIGSTOP)
                with trio.fail_after(WITHIN_S):
                    if how == "unmap":
                        await unmap(bridge, wire.DmaUnmap(wire.UnmapFlag.ALL, 0, 0))
                    else:
                        await bridge.function.reset()
                assert select.select([pidfd], [], [], 0)[0]
            finally:
                os.close(pidfd)


async def test_one_that_never_comes_up_is_given_up_and_can_be_tried_again(
    tmp_path: Path,
) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    script = f"test -e {flag} && exit 3; exec {sys.executable} -m vbus backend run echo"
    config = (
        f'[[backend]]\nname = "far"\nclasses = ["echo"]\nrestart_limit = 2\n'
        f'command = ["/bin/sh", "-c", "{script}"]\n'
    )
    with Served(tmp_path, BUS + config + ECHO) as daemon:
        end = time.monotonic() + WITHIN_S
        while backend(daemon)["state"] != "failed":
            assert time.monotonic() < end
        assert "status 3" in str(backend(daemon)["last_end"])
        assert daemon.ask("device", "show") == []
        assert daemon.vbus("backend", "restart", "far").returncode == 1
        flag.unlink()
        assert daemon.ask("backend", "restart", "far")["state"] == "up"
        assert await call(daemon, b"mended") == b"mended"


def test_a_backend_that_lies_is_disconnected(tmp_path: Path) -> None:
    """Issue 6: forged ids, descriptors, oversized messages; nothing of it stays."""
    with Served(tmp_path, BUS + FAR + ECHO) as daemon:
        before, _ = settled(daemon)
        for lie in LIES:
            said = len(daemon.log.read_text())
            liar = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.system.liar"),
                    *(daemon.runtime / "backends.sock", lie),
                ],
                cwd=tmp_path,
                env={**daemon.environment, "PYTHONPATH": str(Path.cwd())},
            )
            assert liar.wait(WITHIN_S) in (0, -signal.SIGKILL), lie
            end = time.monotonic() + WITHIN_S
            while daemon.fds != before or "ended:" not in log_since(daemon, said):
                assert time.monotonic() < end, lie
            assert "hung up" not in log_since(daemon, said), lie
        assert [one["name"] for one in daemon.ask("backend", "show")] == ["far"]
        assert trio.run(call, daemon, b"lives") == b"lives"
        assert "Traceback" not in daemon.log.read_text()


def log_since(daemon: Served, at: int) -> str:
    return daemon.log.read_text()[at:]


# Under traffic


def place(nth: int) -> str:
    return f"""
[[bus]]
name = "bus{nth}"
[[backend]]
name = "far{nth}"
classes = ["echo"]
[[device]]
name = "echo{nth}"
class = "echo"
backend = "far{nth}"
bus = "bus{nth}"
[[device]]
name = "other{nth}"
class = "echo"
backend = "steady"
bus = "bus{nth}"
[[guest]]
name = "g{nth}"
bus = "bus{nth}"
"""


STEADY = """
[[backend]]
name = "steady"
classes = ["echo"]
"""


class Traffic:
    """A guest that exchanges messages with its two devices all the time."""

    def __init__(self, daemon: Served, nth: int) -> None:
        self.path = daemon.socket(f"g{nth}")
        self.devices = (f"echo{nth}", f"other{nth}")
        """The one that may be killed, and the one that may not."""
        self.exchanged = dict.fromkeys(self.devices, 0)
        self.lives = dict.fromkeys(self.devices, 0)
        """How often the driver of each device started."""
        self.scope = trio.CancelScope()
        self._more = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        async with attach(self.path, memory_mib=16) as bridge:
            host = DriverHost(bridge, drivers={"org.vbus.echo": self._driver})
            with self.scope:  # inside, or nobody would hear the host's last answers
                await host.run()

    def _driver(self, device: DeviceProxy, options: object) -> "_Exchanging":
        return _Exchanging(device, self)

    def note(self, device: str) -> None:
        self.exchanged[device] += 1
        self._more.unpark_all()

    async def lives_again(self, lives: int) -> None:
        """Wait until it has exchanged something in a later life than that."""
        device = self.devices[0]
        with trio.fail_after(WITHIN_S):
            while self.lives[device] <= lives:
                await self._more.park()
            await self._more.park()

    async def goes_on(self) -> None:
        """Wait for ten more messages with each device."""
        wanted = {device: count + 10 for device, count in self.exchanged.items()}
        with trio.fail_after(WITHIN_S):
            while any(self.exchanged[each] < wanted[each] for each in wanted):
                await self._more.park()


class _Exchanging(EchoDriver):
    """The echo driver, with messages that must come back as they went."""

    def __init__(self, device: DeviceProxy, traffic: Traffic) -> None:
        super().__init__(device, {})
        self._traffic = traffic

    async def run(self, started: Callable[[str], None]) -> None:
        running = trio.Event()

        def note(detail: str) -> None:
            started(detail)
            running.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run, note)
            await running.wait()
            name = self.device.name
            self._traffic.lives[name] += 1
            for number in itertools.count():
                message = number.to_bytes(8, "little") * 50
                assert await self.exchange(message) == message
                self._traffic.note(name)


def held(daemon: Served) -> tuple[tuple[int, int], int, dict[str, tuple[int, int]]]:
    """What leaks would show in: descriptors and mappings, in the daemon and in each
    backend, and the daemon's processes."""
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    backends = {
        one["name"]: (
            len(os.listdir(f"/proc/{one['pid']}/fd")),
            len(guest_memory(one["pid"])),
        )
        for one in daemon.ask("backend", "show")
    }
    return settled(daemon), len(children), backends


async def test_random_kills_under_traffic_hurt_only_the_killed(tmp_path: Path) -> None:
    """Issue 6: others lose no message, the killed come back, nothing leaks.

    As often as VBUS_KILLS says, at random moments. Each guest has a device in a backend
    of its own that is killed, and one in a backend of all four that is not.
    """
    choice = random.Random(6)
    config = "".join(map(place, range(4))) + STEADY
    came_back: list[float] = []
    with Served(tmp_path, config) as daemon:
        before, memory = held(daemon), daemon.private_kib
        async with (
            ControlClient(daemon.runtime / "control.sock") as control,
            trio.open_nursery() as nursery,
        ):
            guests = [Traffic(daemon, nth) for nth in range(4)]
            for guest in guests:
                nursery.start_soon(guest.run)
            for guest in guests:
                await guest.goes_on()
            kills = [0, 0, 0, 0]
            for _ in range(KILLS):
                nth = choice.randrange(4)
                kills[nth] += 1
                (shown,) = await control.request("backend.show", name=f"far{nth}")
                lives = guests[nth].lives[f"echo{nth}"]
                await trio.sleep(choice.uniform(0, 0.05))
                os.kill(shown["pid"], signal.SIGKILL)
                began = time.monotonic()
                await guests[nth].lives_again(lives)
                came_back.append(time.monotonic() - began)
                for guest in guests:
                    await guest.goes_on()
            lived = [tuple(guest.lives.values()) for guest in guests]
            assert lived == [(1 + killed, 1) for killed in kills]
            for guest in guests:
                guest.scope.cancel()
        times = sorted(came_back)
        print(f"{KILLS} kills: back after {times[len(times) // 2]:.2f} s, the median,")
        print(f"and {times[-1]:.2f} s at most; {sum(t > 1 for t in times)} after 1 s")
        exchanged = [sum(guest.exchanged.values()) for guest in guests]
        print(f"messages of each guest: {exchanged}")
        await trio.to_thread.run_sync(until_held, daemon, before)
        assert daemon.private_kib < memory + 8192
        assert "Traceback" not in daemon.log.read_text()


def until_held(daemon: Served, before: object) -> None:
    """Wait until it holds what it held before; the last process may just start."""
    end = time.monotonic() + WITHIN_S
    while held(daemon) != before:
        assert time.monotonic() < end, (held(daemon), before)
