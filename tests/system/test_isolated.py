"""Isolated backends under the daemon: what they cannot do, and what they still can.

The intruder is a device of a backend that tries; beside it there is another backend
with another guest's memory. Each attempt is made without isolation too, where it works.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy
from proxy.guest import attach
from proxy.tasks import beside
from proxy.virtio.entropy import Entropy
from proxy.virtio.ports import Console
from tests.netns import isolated
from tests.proxy.host import until
from tests.proxy.virtio.guests import disk_on, found
from tests.system.served import WITHIN_S, Served
from tests.system.test_backends import backend, start_dice, wait_for_state
from tests.transfer import here, process_guest, transfer
from vbus.isolation import missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CONFIG = """
[[bus]]
name = "bus0"
[[bus]]
name = "bus1"
[[guest]]
name = "g0"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus1"
[[backend]]
name = "other"
classes = ["echo"]
[[device]]
name = "echo0"
class = "echo"
bus = "bus1"
[[device]]
name = "spy"
class = "intruder"
bus = "bus0"
[[backend]]
name = "spies"
classes = ["intruder"]
"""


def spies(isolation: str, *paths: Path) -> str:
    """Give the rest of the intruder's backend."""
    start = [sys.executable, "-m", "vbus", "backend", "run", "--name", "spies"]
    command = json.dumps([*start, "tests.system.intruder:Intruder"])
    own = json.dumps([str(path) for path in paths])
    return f'isolation = "{isolation}"\ncommand = {command}\npaths = {own}\n'


def memory_of(pid: int) -> tuple[int, int, int]:
    """Guest memory in a process: an address, its descriptor if any, its inode."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:" in line:
            words = line.split()
            address, inode = int(words[0].partition("-")[0], 16), int(words[4])
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.stat(f"/proc/{pid}/fd/{fd}").st_ino == inode:
                    return address, int(fd), inode
            return address, 0, inode
    raise AssertionError(f"process {pid} has no guest memory")


def inodes(pid: int) -> set[int]:
    """All memory files in a process, mapped or open."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    mapped = {int(line.split()[4]) for line in lines if "memfd:" in line}
    fds = Path(f"/proc/{pid}/fd").iterdir()
    return mapped | {fd.stat().st_ino for fd in fds if "memfd:" in os.readlink(fd)}


def held_by(pid: int) -> tuple[str, str]:
    """Give no_new_privs and the mode of seccomp."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines)
    return fields["NoNewPrivs"], fields["Seccomp"]


def secret(folder: Path) -> Path:
    """Make a folder with something to read, and something to remove."""
    folder.mkdir()
    (folder / "doomed").touch()
    (folder / "secret").write_text("secret")
    return folder / "secret"


def interfaces() -> str:
    return Path("/proc/net/dev").read_text()


async def attempt(spy: DeviceProxy, what: str, **victim: object) -> dict[str, str]:
    asked = json.dumps({"try": what, **victim}).encode().ljust(2000)
    _, answer = await spy.call(0, asked)
    result = json.loads(answer)
    assert isinstance(result, dict)
    return result


@asynccontextmanager
async def both_guests(served: Served) -> AsyncIterator[DeviceProxy]:
    """Each guest shares memory with its device; gives the intruder."""
    async with attach(served.socket("g0")) as one, attach(served.socket("g1")) as two:
        spy, echo = await one.open("spy"), await two.open("echo0")
        await echo.ring(0, 8)
        yield spy


def pid_of(served: Served, name: str) -> int:
    pid = backend(served, name)["pid"]
    assert isinstance(pid, int)
    return pid


async def try_all(served: Served, outside: Path) -> dict[str, dict[str, str]]:
    """Have the intruder try everything."""
    daemon, other = served.process.pid, pid_of(served, "other")
    async with both_guests(served) as spy:
        result = {}
        for name, pid in (("daemon", daemon), ("backend", other)):
            address, fd, _ = memory_of(pid)
            about = {"pid": pid, "address": address, "fd": fd}
            result[name] = await attempt(spy, "against", **about)
        result["file"] = await attempt(spy, "file", path=str(outside))
        for name in ("control.sock", "backends.sock", "guests/g1.sock"):
            path = str(served.runtime / name)
            result[name] = await attempt(spy, "socket", path=path)
        result["privileges"] = await attempt(spy, "privileges")
        assert (await attempt(spy, "file", path=str(outside)))["read"]  # it lives
    return result


@pytest.fixture(scope="module")
def spied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon with the intruder, which may open what is in `run/../own`."""
    folder = tmp_path_factory.mktemp("spied")
    own = secret(folder / "own").parent
    with Served(folder, CONFIG + spies("required", own)) as served:
        yield served


async def test_an_isolated_backend_reaches_nobody(
    spied: Served, tmp_path: Path
) -> None:
    """Issue 6, R51: no file, no process, no socket, no privilege, no other's memory."""
    outside = secret(tmp_path / "elsewhere")
    assert held_by(pid_of(spied, "spies")) == ("1", "2")
    result = await try_all(spied, outside)
    for victim in ("daemon", "backend"):
        tried = result.pop(victim)
        files = {name for name in tried if name.startswith("/proc")}
        assert {tried.pop(name) for name in files} == {"EACCES"}
        assert set(tried.values()) == {"EPERM"}
    assert set(result.pop("file").values()) == {"EACCES"}
    assert {step for tried in result.values() for step in tried.values()} == {"EPERM"}
    assert outside.read_text() == "secret"


@pytest.mark.skipif(os.geteuid() != 0, reason="others' processes are root's to touch")
async def test_without_isolation_the_same_attempts_succeed(tmp_path: Path) -> None:
    """The test above would fail if nothing were held back."""
    outside = secret(tmp_path / "elsewhere")
    with Served(tmp_path, CONFIG + spies("off")) as served:
        result = await try_all(served, outside)
    failed = {
        (victim, step): how
        for victim, tried in result.items()
        for step, how in tried.items()
        if how != "ok"
    }
    assert failed == {}


async def test_a_backend_has_the_memory_of_its_own_guests_only(spied: Served) -> None:
    """R51: another guest's is neither mapped nor open there; the daemon has both."""
    async with both_guests(spied):
        spy, other = (pid_of(spied, name) for name in ("spies", "other"))
        assert inodes(spy)
        assert inodes(other)
        assert not inodes(spy) & inodes(other)
        assert inodes(spy) | inodes(other) <= inodes(spied.process.pid)


async def test_its_own_paths_are_open_to_it(spied: Served) -> None:
    async with attach(spied.socket("g0")) as bridge:
        spy = await bridge.open("spy")
        own = spied.runtime.parent / "own" / "secret"
        tried = await attempt(spy, "file", path=str(own))
    assert set(tried.values()) == {"ok"}


def test_a_path_of_the_configuration_that_is_missing_is_named(tmp_path: Path) -> None:
    config = CONFIG + spies("auto", tmp_path / "nowhere") + "restart_limit = 0\n"
    with Served(tmp_path, config) as served:
        assert backend(served, "spies")["state"] == "failed"
        assert f"isolation: no {tmp_path / 'nowhere'}" in served.log.read_text()


class OnOldKernel(Served):
    """`vbus serve` where there is no Landlock."""

    def start(self) -> "subprocess.Popen[bytes]":
        old = (
            "import os, sys; from tests.vbus.isolation.test_asking import *;"
            "without(LANDLOCK); os.execv(sys.argv[1], sys.argv[1:])"
        )
        config = str(self.log.parent / "vbus.toml")
        serve = [sys.executable, "-m", "vbus", "serve", "--config", config]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", old, *serve], env=self.environment, stderr=log
            )


def test_required_isolation_that_is_absent_is_refused_and_told(tmp_path: Path) -> None:
    """Issue 6: the others come up with what there is, and say so."""
    config = CONFIG + 'isolation = "required"\nrestart_limit = 0\n'
    with OnOldKernel(tmp_path, config) as served:
        refused, other = backend(served, "spies"), backend(served, "other")
        assert (refused["state"], refused["starts"]) == ("failed", 0)
        assert str(refused["last_end"]).endswith(
            ": isolation is required, but Landlock is not there"
            " (a kernel of 5.13 or newer, lsm=landlock)"
        )
        assert other["state"] == "up"
        assert held_by(pid_of(served, "other")) == ("1", "2")
        assert "isolated only in part: Landlock" in served.log.read_text()


def test_who_starts_a_backend_by_hand_decides(spied: Served, tmp_path: Path) -> None:
    """R60: it is isolated unless told otherwise, as one that the daemon starts."""
    held = held_by(os.getpid())
    free = start_dice(spied, "--name", "free", "--isolation", "off")
    dice = start_dice(spied, "--path", str(tmp_path))
    try:
        wait_for_state(spied, "free", "up")
        wait_for_state(spied, "casino", "up")
        # An answer means that all the daemon said before has been done.
        spied.ask("device", "add", "d0", "--class", "dice", "--backend", "free")
        spied.ask("device", "add", "d1", "--class", "dice", "--backend", "casino")
        assert held_by(free.pid) == held
        assert held_by(dice.pid) == ("1", "2")
    finally:
        for process in (free, dice):
            process.terminate()
            assert process.wait(WITHIN_S) == 0


# What is in the tree works isolated

DISKS = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
[[backend]]
name = "far"
classes = ["virtio-blk", "virtio-console", "virtio-rng"]
isolation = "required"
paths = ["{folder}/later"]
[[device]]
name = "disk0"
class = "virtio-blk"
path = "{folder}/disk0"
size = "1M"
bus = "bus0"
[[device]]
name = "rom0"
class = "virtio-blk"
path = "{folder}/rom0"
readonly = true
bus = "bus0"
[[device]]
name = "tty0"
class = "virtio-console"
to = ["pty", "unix:{folder}/sockets/port", "log:{folder}/log0"]
bus = "bus0"
[[device]]
name = "rng0"
class = "virtio-rng"
bus = "bus0"
"""


async def check_disks(bridge: BridgeDriver, folder: Path) -> None:
    data = os.urandom(8192)
    async with disk_on(bridge, "disk0") as disk:
        await disk.write(4096, data)
        await disk.flush()
        assert await disk.read(4096, 8192) == data
    assert (folder / "disk0").read_bytes()[4096:12288] == data
    async with disk_on(bridge, "rom0") as disk:
        assert await disk.read(0, 512) == b"r" * 512


async def check_console(bridge: BridgeDriver, folder: Path, pty: Path) -> None:
    async with found(bridge, "tty0") as device:
        console = Console(device)
        await console.start()
        async with beside(console.run):
            for port in console.ports:
                await port.there.wait()
            await console.ports[2].send(b"logged\n")
            await until(lambda: (folder / "log0").read_bytes() == b"logged\n")
            terminal = os.open(pty, os.O_RDWR | os.O_NOCTTY)
            try:
                os.write(terminal, b"typed")
                assert await console.ports[0].receive() == b"typed"
            finally:
                os.close(terminal)
            stream = await trio.open_unix_socket(folder / "sockets" / "port")
            async with stream:
                await stream.send_all(b"said")
                assert await console.ports[1].receive() == b"said"


async def check_rng(bridge: BridgeDriver) -> None:
    async with found(bridge, "rng0") as device:
        entropy = Entropy(device)
        await entropy.start()
        async with beside(entropy.run):
            assert len(set(await entropy.read(64))) > 8


def until_back(served: Served, device: str) -> None:
    """Wait until a device is there again, of the backend's second process."""
    end = time.monotonic() + WITHIN_S
    while backend(served)["starts"] != 2 or (
        served.vbus("device", "show", device).returncode
    ):
        assert time.monotonic() < end, served.log.read_text()


async def test_disks_consoles_and_random_bytes_work_isolated(tmp_path: Path) -> None:
    """The daemon knows their files; one that comes later needs one of `paths`.

    All of them come back when the backend was killed, which leaves its socket behind.
    """
    folder = tmp_path / "data"
    (folder / "sockets").mkdir(parents=True)
    (folder / "later").mkdir()
    (folder / "rom0").write_bytes(b"r" * 512)
    with Served(tmp_path, DISKS.format(folder=folder)) as served:
        os.kill(pid_of(served, "far"), signal.SIGKILL)
        until_back(served, "tty0")
        places = served.ask("stats", "devices/tty0/places")
        async with attach(served.socket("g1")) as bridge:
            with trio.fail_after(WITHIN_S):
                await check_disks(bridge, folder)
                await check_console(bridge, folder, Path(places[0][4:]))
                await check_rng(bridge)
        words = ("device", "add", "disk1", "--class", "virtio-blk", "size=1M")
        done = served.vbus(*words, f"path={folder}/disk1")
        assert f"{folder}/disk1 is not there, or out of reach of this" in done.stderr
        done = served.vbus(*words, f"path={tmp_path}/log")
        assert f"{tmp_path}/log is out of reach of this isolated" in done.stderr
        served.ask(*words, f"path={folder}/later/disk1")
        assert (folder / "later" / "disk1").stat().st_size == 1 << 20
        assert served.stop() == 0
        assert "Traceback" not in served.log.read_text()
    assert not (folder / "sockets" / "port").exists()


HOST, VENET, CARD, LATER = "10.9.0.1", "10.9.0.2", "10.9.0.3", "10.9.1.1"
NET = f"""
[[backend]]
name = "net"
classes = ["switch", "switch-tap", "venet", "venet-tap", "virtio-net"]
isolation = "required"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "lan0"
address = "{HOST}/24"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "{name}"
class = "{kind}"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name, kind in (("ve", "venet"), ("card", "virtio-net"))
)


@pytest.mark.net
@isolated
async def test_switches_taps_and_cards_work_isolated(tmp_path: Path) -> None:
    """A TAP made before, made later, and taken away and given back."""
    with Served(tmp_path, NET) as served:
        async with (
            process_guest(served, "ve", f"ve={VENET}/24") as venet,
            process_guest(served, "card", f"card={CARD}/24") as card,
        ):
            at_venet = partial(here, prefix=venet)
            at_card = partial(here, prefix=card)
            await transfer(at_venet, here, HOST, "venet to host", 4 << 20)
            await transfer(at_venet, at_card, CARD, "venet to card", 4 << 20)
        ask = partial(trio.to_thread.run_sync, served.ask)
        words = ("device", "add", "tap0", "--class", "venet-tap", "ifname=later0")
        await ask(*words, f"address={LATER}/24")
        for enabled, there in (("false", False), ("true", True)):
            await ask("device", "set", "tap0", f"enabled={enabled}")
            assert ("later0" in interfaces()) == there
        assert "Traceback" not in served.log.read_text()
